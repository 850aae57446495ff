"""Stacks of runs against single ones, and what is refused."""

import pytest
import torch

from fastlens.errors import SweepError
from fastlens.patching.grid import grid_of
from fastlens.patching.metrics import logit_diff, reading_of
from fastlens.patching.prompts import Prompts
from fastlens.patching.runs import Run
from fastlens.patching.sites import SITES
from fastlens.patching.stacked import (
    STACK_BYTES,
    Patch,
    run_alone,
    run_stacked,
    runs_per_stack,
)
from tests.close import assert_close_to
from tests.models import ours, prompts

NOTHING = {"layer": None, "pos": None, "head": None, "neuron": None}


def run(site, layer, *index):
    return Run((0,), SITES[site], layer, index)


def test_a_patch_replaces_exactly_the_entries_of_each_run():
    source = torch.randn(2, 3, 4, 5)
    base = torch.randn(8, 3, 4, 5)
    before = base.clone()
    runs = [
        run("z", 0, None, 1),
        run("z", 0, 2, 3),
        run("z", 0, (0, 2), (1, 3)),
        run("z", 0, 0, None),
    ]
    patched = Patch(runs, source)(base, None)
    expected = before.clone().unflatten(0, (4, 2))
    expected[0, :, :, 1] = source[:, :, 1]
    expected[1, :, 2, 3] = source[:, 2, 3]
    for pos in (0, 2):
        for head in (1, 3):
            expected[2, :, pos, head] = source[:, pos, head]
    expected[3, :, 0] = source[:, 0]
    assert torch.equal(patched, expected.flatten(0, 1))
    assert torch.equal(base, before), "the activation that was passed in must not change"


def test_a_patch_handles_three_indices():
    source, base = torch.randn(1, 4, 5, 5), torch.zeros(1, 4, 5, 5)
    patched = Patch([run("pattern", 0, 2, (1, 4), None)], source)(base, None)
    expected = base.clone()
    expected[:, 2, [1, 4]] = source[:, 2, [1, 4]]
    assert torch.equal(patched, expected)


def test_a_patch_of_another_shape_is_refused():
    with pytest.raises(SweepError, match=r"blocks\.0\.hook_resid_pre has shape \[2, 3, 4\]"):
        Patch([run("resid_pre", 0, 1)], torch.zeros(1, 3, 4))(torch.zeros(2, 3, 4), None)


@pytest.mark.parametrize("stack", [1, 2, 5, 1000])
def test_stacks_of_any_size_equal_single_runs(stack):
    model = ours("llama", dtype=torch.float64)
    clean, base = prompts(2, 5), prompts(2, 5, seed=1)
    grid = grid_of(model, Prompts(clean, base), ["q", "z"], None, NOTHING)
    source = dict(model.run_with_cache(clean)[1].items())
    reading = reading_of(logit_diff(1, 2), model, 5, 2)
    names = [grid.name(one) for one in grid.runs]
    done = []
    with torch.no_grad():
        stacked = run_stacked(
            model, base, grid.runs, source, reading, names, stack=stack, progress=done.append
        )
        alone = [
            run_alone(model, base, one, source, reading, name)
            for one, name in zip(grid.runs, names, strict=True)
        ]
    assert_close_to(torch.stack(stacked), torch.stack(alone), atol=1e-12)
    assert sum(done) == len(grid.runs) == 24
    # Three layers, two sites, four heads each.
    assert len(done) == 6 * -(-4 // min(stack, 4))


def test_blocks_below_the_patch_are_not_run_again():
    model = ours("gpt2")
    calls = [0, 0, 0]
    for layer, block in enumerate(model.blocks):
        forward = block.forward

        def counted(*args, forward=forward, layer=layer, **kwargs):
            calls[layer] += 1
            return forward(*args, **kwargs)

        block.forward = counted
    base, clean = prompts(1, 4), prompts(1, 4, seed=1)
    source = dict(model.run_with_cache(clean)[1].items())
    calls[:] = [0, 0, 0]
    runs = [run("resid_pre", layer, 0) for layer in (2, 1)]
    reading = reading_of(logit_diff(1, 2), model, 4, 1)
    run_stacked(model, base, runs, source, reading, ["a", "b"], stack=8, progress=lambda n: None)
    # Blocks 0 and 1 once for the base run; then block 1 for one patch and block 2 for both.
    assert calls == [1, 2, 2]


def test_a_place_that_nothing_passes_is_an_error():
    """TransformerLens' own flags leave such places silent."""
    model = ours("gpt2")
    source = {"blocks.0.attn.hook_result": torch.zeros(1, 4, 4, 32)}
    reading = reading_of(logit_diff(1, 2), model, 4, 1)
    model.set_use_attn_result = lambda value: None
    with pytest.raises(SweepError, match="nothing passed the hook point"):
        run_alone(model, prompts(1, 4), run("result", 0, None, 0), source, reading, "a run")


def test_the_size_of_a_stack_follows_the_work_of_a_run():
    model = ours("gpt2")

    def size(n_pos, batch, all_logits=False):
        return runs_per_stack(model, n_pos, batch, 4, all_logits=all_logits)

    assert size(10, 1) > size(10, 2) > size(10, 8) > 1
    assert size(10, 1) > size(100, 1)
    assert size(10, 1) > size(10, 1, all_logits=True)
    assert size(10, 10**9) == 1
    # The widest tensor of a block alone, for every row, stays within the budget.
    assert size(10, 1) * 10 * model.cfg.d_mlp * 4 < STACK_BYTES
