"""Whether a package is there."""

import importlib.util
import sys


def is_library_available(name: str) -> bool:
    """Whether a module can be imported; it is not. Of ``"a.b"``, the package ``a`` is imported."""
    if name in sys.modules:
        # None is how an import is forbidden.
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # There is no package that it could be in.
        return False
