"""TransformerLens' old path of `fastlens.compat.utilities`: the same names, and no warning."""

from typing import Any

from fastlens.compat import utilities
from fastlens.compat.utilities import *  # noqa: F403 - exactly the names of `__all__`
from fastlens.compat.utilities import __all__ as __all__


def __getattr__(name: str) -> Any:
    # What is not there gets its message, and its near names, there.
    return getattr(utilities, name)
