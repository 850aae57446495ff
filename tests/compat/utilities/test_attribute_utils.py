"""Attributes of attributes, against TransformerLens."""

from types import SimpleNamespace

import pytest

from fastlens.compat.utilities.attribute_utils import get_nested_attr, set_nested_attr

COMPARED = [
    "transformer_lens.utilities.attribute_utils.get_nested_attr",
    "transformer_lens.utilities.attribute_utils.set_nested_attr",
]


def tree() -> SimpleNamespace:
    return SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=1)), d=2)


@pytest.mark.tl
@pytest.mark.parametrize("name", ["d", "a.b", "a.b.c"])
def test_as_transformer_lens(theirs, name):
    tl = theirs("attribute_utils")
    ours, other = tree(), tree()
    assert get_nested_attr(ours, name) == tl.get_nested_attr(ours, name)
    set_nested_attr(ours, name, "new")
    tl.set_nested_attr(other, name, "new")
    assert ours == other != tree()


def test_what_is_not_there():
    with pytest.raises(AttributeError):
        get_nested_attr(tree(), "a.x.c")
    with pytest.raises(AttributeError):
        set_nested_attr(tree(), "a.x.c", 1)
