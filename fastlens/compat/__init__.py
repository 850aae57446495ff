"""TransformerLens' own module names, for code that is written against them.

`install` makes `import transformer_lens` give fastlens; ``python -m fastlens.compat script.py``
runs an unchanged script so. Names that TransformerLens has at its top level are here too, so that
``import fastlens.compat as transformer_lens`` needs no installing.
"""

import importlib
from typing import Any

from fastlens.compat.finder import install as install
from fastlens.compat.finder import uninstall as uninstall
from fastlens.compat.names import names_of


def __getattr__(name: str) -> Any:
    if name == "utils":
        return importlib.import_module("fastlens.compat.utils")
    if name not in names_of(""):
        raise AttributeError(f"module 'fastlens.compat' has no attribute {name!r}")
    module, attribute = names_of("")[name]
    return getattr(importlib.import_module(module), attribute)
