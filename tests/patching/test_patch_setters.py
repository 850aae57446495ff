"""The six setters: what each one copies, equal to TransformerLens', and how they are recognised."""

import functools

import pytest
import torch

from fastlens.errors import PatchIndexError
from fastlens.patching import patch_setters
from fastlens.patching.patch_setters import SELECTIONS, Selection, selection_of

VECTORS, PATTERN = (2, 5, 4, 3), (2, 4, 5, 5)
# Setter, shape of the activation, index, what is copied.
CASES = [
    ("layer_pos_patch_setter", (2, 5, 3), [1, 2], (slice(None), 2)),
    ("layer_pos_patch_setter", VECTORS, [1, -1], (slice(None), 4)),
    ("layer_pos_patch_setter", VECTORS, [1, [0, 3]], (slice(None), [0, 3])),
    ("layer_pos_head_vector_patch_setter", VECTORS, [1, 2, 3], (slice(None), 2, 3)),
    ("layer_head_vector_patch_setter", VECTORS, [0, 3], (slice(None), slice(None), 3)),
    ("layer_head_pattern_patch_setter", PATTERN, [0, 3], (slice(None), 3)),
    ("layer_head_pos_pattern_patch_setter", PATTERN, [0, 3, 1], (slice(None), 3, 1)),
    (
        "layer_head_dest_src_pos_pattern_patch_setter",
        PATTERN,
        [0, 3, 4, 1],
        (slice(None), 3, 4, 1),
    ),
]
each_case = pytest.mark.parametrize(("name", "shape", "index", "copied"), CASES)


def activations(shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


@each_case
def test_copies_in_place_and_returns(name, shape, index, copied):
    corrupted, clean = activations(shape)
    expected, clean_before = corrupted.clone(), clean.clone()
    expected[copied] = clean[copied]
    assert not torch.equal(expected, corrupted)
    result = getattr(patch_setters, name)(corrupted, index, clean)
    assert result is corrupted
    assert torch.equal(result, expected)
    assert torch.equal(clean, clean_before)


@each_case
@pytest.mark.tl
def test_equals_transformer_lens(name, shape, index, copied):
    theirs = pytest.importorskip("transformer_lens.patching")
    corrupted, clean = activations(shape)
    want = getattr(theirs, name)(corrupted.clone(), index, clean)
    got = getattr(patch_setters, name)(corrupted.clone(), index, clean)
    assert torch.equal(got, want)


@each_case
def test_one_clean_prompt_for_a_batch(name, shape, index, copied):
    corrupted, clean = activations(shape)
    expected = corrupted.clone()
    expected[copied] = clean[:1].expand(shape)[copied]
    assert torch.equal(getattr(patch_setters, name)(corrupted, index, clean[:1]), expected)


@pytest.mark.parametrize("setter", SELECTIONS, ids=lambda setter: setter.__name__)
def test_an_index_of_another_length_is_refused(setter):
    right = 1 + len(SELECTIONS[setter].axes)
    for length in (right - 1, right + 1):
        with pytest.raises(AssertionError, match=rf"has {length} entries.*needs \[layer, "):
            setter(torch.zeros(PATTERN), [0] * length, torch.zeros(PATTERN))
        with pytest.raises(PatchIndexError):
            setter(torch.zeros(PATTERN), [0] * length, torch.zeros(PATTERN))


def test_selections_say_what_is_copied():
    for name, shape, index, copied in CASES:
        selection = SELECTIONS[getattr(patch_setters, name)]
        where = [slice(None)] * len(shape)
        for axis, entry in zip(selection.axes, index[1:], strict=True):
            where[1 + axis] = entry
        mine, wanted = torch.zeros(shape), torch.zeros(shape)
        mine[tuple(where)] = wanted[copied] = 1.0
        assert torch.equal(mine, wanted), name
        assert selection.of_pattern == ("pattern" in name)


def test_our_setters_are_recognised():
    assert selection_of(patch_setters.layer_head_vector_patch_setter) == Selection((1,))


@pytest.mark.tl
def test_their_setters_are_recognised():
    theirs = pytest.importorskip("transformer_lens.patching")
    for ours, selection in SELECTIONS.items():
        assert selection_of(getattr(theirs, ours.__name__)) == selection


def test_nothing_else_is_recognised():
    known = patch_setters.layer_pos_patch_setter

    @functools.wraps(known)
    def halved(corrupted, index, clean):
        return known(corrupted, index, clean / 2)

    class Unhashable:
        __hash__ = None

        def __call__(self, corrupted, index, clean):
            return corrupted

    assert selection_of(halved) is None
    assert selection_of(functools.partial(known)) is None
    assert selection_of(lambda corrupted, index, clean: known(corrupted, index, clean)) is None
    assert selection_of(Unhashable()) is None


@pytest.mark.tl
def test_a_setter_put_into_their_module_is_not_theirs(monkeypatch):
    theirs = pytest.importorskip("transformer_lens.patching")

    def mine(corrupted, index, clean):
        return corrupted

    monkeypatch.setattr(theirs, "layer_pos_patch_setter", mine)
    assert selection_of(mine) is None
