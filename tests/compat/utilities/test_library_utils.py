"""Whether a package is there, against TransformerLens."""

import sys

import pytest

from fastlens.compat.utilities.library_utils import is_library_available

COMPARED = ["transformer_lens.utilities.library_utils.is_library_available"]


@pytest.mark.tl
@pytest.mark.parametrize("name", ["torch", "torch.nn", "wave", "no_such_package"])
def test_as_transformer_lens(theirs, name):
    found = is_library_available(name)
    assert found == theirs("library_utils").is_library_available(name)
    assert found == (name != "no_such_package")


def test_nothing_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    assert is_library_available("this") and "this" not in sys.modules


def test_a_part_of_what_is_not_there():
    """TransformerLens' raises."""
    assert not is_library_available("no_such_package.part")


def test_a_forbidden_import(monkeypatch):
    """TransformerLens' says that it can be imported."""
    monkeypatch.setitem(sys.modules, "forbidden", None)
    assert not is_library_available("forbidden")
