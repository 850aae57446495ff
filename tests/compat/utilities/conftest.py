"""TransformerLens' utilities, imported without its warnings."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def theirs() -> Callable[[str], Any]:
    """The module of that name below `transformer_lens.utilities`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformer_lens.utilities")

    def module(name: str = "") -> Any:
        path = "transformer_lens.utilities"
        return importlib.import_module(f"{path}.{name}" if name else path)

    return module
