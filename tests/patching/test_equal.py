"""Where cached values are the run's own."""

import torch

from fastlens.patching.equal import equality
from fastlens.patching.runs import PlannedPatch, Run
from fastlens.patching.sources import Source
from tests.models import ours, prompts


def null_test(patch):
    """The null test of a cache of other prompts that differ at position 3."""
    model = ours("gpt2")
    tokens = prompts(2, 6)
    clean = tokens.clone()
    clean[:, 3] = (clean[:, 3] + 5) % 50
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, return_cache_object=False)
    sources = [Source("other", "other"), Source("cache", "a cache", cache=cache)]
    return equality(model, tokens, [Run((0,), (patch,))], sources)[1]


def test_positions_before_the_first_difference_are_null():
    patch = PlannedPatch("resid_pre", 1, value=1)
    assert null_test(patch)(patch, 1) == frozenset({0, 1, 2})


def test_at_the_embedding_every_other_position_is_null():
    patch = PlannedPatch("resid_pre", 0, value=1)
    assert null_test(patch)(patch, 0) == frozenset({0, 1, 2, 4, 5})


def test_heads_and_keys_are_looked_at_by_themselves():
    patch = PlannedPatch("z", 1, columns=(2,), value=1)
    assert null_test(patch)(patch, 0) == frozenset({0, 1, 2})
    patch = PlannedPatch("pattern", 1, columns=(0,), keys=(5,), value=1)
    # Key 5 is seen by the last position only.
    assert null_test(patch)(patch, 0) == frozenset({0, 1, 2, 3, 4})


def test_without_a_cache_nothing_is_run():
    run = Run((0,), (PlannedPatch("resid_pre", 0, value=0),))
    model = ours("gpt2")
    model.blocks[0].forward = None  # any forward would fail
    assert equality(model, prompts(1, 4), [run], [Source("other", "other")]) == {}
