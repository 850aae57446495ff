"""The tests: a package so that they can share ``tests.configs`` and ``tests.close``.

Every call into fastlens is checked against its annotations by `checked` (pyproject.toml names it
to jaxtyping's pytest option).
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_CHECKS: dict[tuple[str, ...], Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, which compiles the checks of a nested function once instead of at each definition.

    jaxtyping hands over stand-ins without a body, so one may serve every closure of a place; left
    to itself, beartype would take most of the time of the tests.
    """
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    key = (function.__module__, function.__qualname__, repr(function.__annotations__))
    key += function.__code__.co_varnames
    if key not in _CHECKS:
        _CHECKS[key] = beartype(function)
    return _CHECKS[key]
