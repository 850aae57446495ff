"""One call for each public name of TransformerLens 3.9, run with both libraries.

``CALLS[name]`` is a function of a `Library`; what it returns is compared. ``name`` is where the
thing is defined, below `transformer_lens`. `tests/compat/test_surface.py` checks that every call
does run the thing it is named for, in both libraries, and that no name is left without one.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from tests.compat.library import Library

Call = Callable[[Library], Any]


def _gathered() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for module in pkgutil.iter_modules(__path__):
        for prefix, table in importlib.import_module(f"{__name__}.{module.name}").CALLS.items():
            calls |= {f"{prefix}.{name}".rstrip("."): call for name, call in table.items()}
    return calls


CALLS = _gathered()
