"""Runs made with hooks: one forward each, or stacked."""

import pytest
import torch

from fastlens.errors import SweepError
from fastlens.patching.hooked import HookedRuns, places_of
from fastlens.patching.runs import PlannedPatch, Run
from fastlens.patching.sources import Source
from tests.close import assert_close_to
from tests.models import ours, prompts

SOURCES = [Source("other", "other"), Source("number", "zero")]
RUNS = [
    Run((0,), (PlannedPatch("resid_pre", 1, (2,)),)),
    Run((1,), (PlannedPatch("z", 0, None, (1,), value=1), PlannedPatch("mlp_out", 2, (4,)))),
    Run((2,), (PlannedPatch("pattern", 1, (3, 4), (0, 2), (1,), value=1),)),
]


def made(name="gpt2"):
    model = ours(name)
    base, other = prompts(2, 6, 0), prompts(2, 6, 1)
    names = places_of(RUNS, SOURCES)
    with torch.no_grad():
        _, cache = model.run_with_cache(other, names_filter=names, return_cache_object=False)
    return HookedRuns(model, base, None, SOURCES, cache), cache


def test_places_that_read_the_other_prompt():
    assert places_of(RUNS, SOURCES) == ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]


def test_alone_is_what_a_user_would_write():
    how, cache = made()

    def put(residual, hook):
        residual[:, 2] = cache[hook.name][:, 2]

    with torch.no_grad():
        expected = how.model.run_with_hooks(
            how.base, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: put(x, hook))]
        )
        assert torch.equal(how.alone(RUNS[0]), expected)


def test_several_places_of_one_run():
    how, cache = made()

    def no_head(z, hook):
        z[:, :, 1] = 0.0

    def put(out, hook):
        out[:, 4] = cache[hook.name][:, 4]

    hooks = [("blocks.0.attn.hook_z", no_head), ("blocks.2.hook_mlp_out", put)]
    with torch.no_grad():
        expected = how.model.run_with_hooks(how.base, fwd_hooks=hooks)
        assert_close_to(how.alone(RUNS[1]), expected)


def test_a_product_of_heads_rows_and_keys():
    how, _ = made()

    def hide(pattern, hook):
        for head in (0, 2):
            pattern[:, head, 3:5, 1] = 0.0

    with torch.no_grad():
        expected = how.model.run_with_hooks(
            how.base, fwd_hooks=[("blocks.1.attn.hook_pattern", hide)]
        )
        assert_close_to(how.alone(RUNS[2]), expected)
        assert_close_to(how.alone(RUNS[2], materialise=True), expected)


@pytest.mark.parametrize("n_stacked", [1, 2, 3])
def test_stacked_is_alone(n_stacked):
    how, _ = made()
    seen = {}
    with torch.no_grad():
        for numbers, logits in how.stacked(RUNS, n_stacked):
            seen |= dict(zip(numbers, logits, strict=True))
        for number, run in enumerate(RUNS):
            assert_close_to(seen[number], how.alone(run))
    assert sorted(seen) == [0, 1, 2]


def test_hooks_come_off_and_a_place_nobody_passes_is_an_error():
    how, _ = made()
    how.alone(RUNS[1])
    assert not any(point.fwd_hooks for point in how.model.hook_dict.values())
    how.model.blocks[1].attn.hook_z.forward = lambda x: x
    how.model.blocks[0].forward = lambda x, **kwargs: x
    with pytest.raises(SweepError, match="nothing passed the hook point"):
        how.alone(RUNS[1])
