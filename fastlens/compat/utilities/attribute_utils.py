"""Attributes of attributes, by dotted names."""

import functools
from typing import Any


def get_nested_attr(obj: Any, attr_str: str) -> Any:
    """``obj.a.b.c`` for ``"a.b.c"``."""
    return functools.reduce(getattr, attr_str.split("."), obj)


def set_nested_attr(obj: Any, attr_str: str, value: Any) -> None:
    """Sets ``obj.a.b.c`` for ``"a.b.c"``; all but the last must exist."""
    owner, _, name = attr_str.rpartition(".")
    setattr(get_nested_attr(obj, owner) if owner else obj, name, value)
