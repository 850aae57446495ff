"""Runs made with hooks: one forward each, or stacked."""

import pytest
import torch

from fastlens.errors import SweepError
from fastlens.patching import Patch, plan
from fastlens.patching.execute import hooked_runs
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


# -- the oracle itself: every source and mode, written out by hand -------------------------------


def oracle(patches, batch=3):
    """Logits of one run alone, and the model, base, other prompt and sources they come from."""
    model = ours("gpt2", dtype=torch.float64)
    base, other = prompts(batch, 6, 0), prompts(batch, 6, 1)
    query = plan(model, other, base, runs=[patches], metric=lambda x: x.mean((1, 2)))
    with torch.no_grad():
        _, cache = model.run_with_cache(other)
        logits = hooked_runs(query, query.runs).alone(query.runs[0])
    return logits, model, base, cache, query


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["replace", "add", "scale"])
@pytest.mark.parametrize("kind", ["other", "zero", "number", "mean", "resample", "tensor", "cache"])
def test_every_source_and_mode(kind, mode):
    """Heads 3 and 1 at positions 4 and 2, in that order, of layer 1."""
    given = noise(3, 2, 2, 8)
    name = "blocks.1.attn.hook_z"
    sources = {"number": 0.7, "tensor": given, "cache": {name: noise(3, 6, 4, 8)}}
    source = sources.get(kind, kind)
    got, model, base, cache, query = oracle(
        Patch("z", 1, pos=[4, 2], head=[3, 1], source=source, mode=mode)
    )
    z = cache[name]
    permutation = [s.permutation for s in query.sources if s.kind == "resample"]
    if permutation:
        assert sorted(permutation[0].tolist()) == [0, 1, 2]
        assert all(permutation[0] != torch.arange(3))

    def put(activation, hook):
        for i, pos in enumerate([4, 2]):
            for j, head in enumerate([3, 1]):
                for example in range(3):
                    new = {
                        "other": z[example, pos, head],
                        "zero": torch.zeros(8),
                        "number": torch.full((8,), 0.7, dtype=torch.float64),
                        "mean": (z[0, pos, head] + z[1, pos, head] + z[2, pos, head]) / 3,
                        "resample": z[int(permutation[0][example]), pos, head]
                        if permutation
                        else 0,
                        "tensor": given[example, i, j],
                        "cache": source[name][example, pos, head] if kind == "cache" else 0,
                    }[kind]
                    old = activation[example, pos, head].clone()
                    changed = {"replace": new, "add": old + new, "scale": old * new}[mode]
                    activation[example, pos, head] = changed

    with torch.no_grad():
        expected = model.run_with_hooks(base, fwd_hooks=[(name, put)])
        changed = float((expected - model(base)).abs().max())
    assert (changed > 1e-6) == ((kind, mode) != ("zero", "add"))
    assert_close_to(got, expected, atol=1e-12)


def test_patches_of_one_place_act_in_the_order_given():
    add = Patch("resid_mid", 1, pos=2, source=noise(32), mode="add")
    half = Patch("resid_mid", 1, pos=2, source=0.5, mode="scale")
    for patches, formula in (
        ([add, half], lambda x: (x + noise(32)) * 0.5),
        ([half, add], lambda x: x * 0.5 + noise(32)),
    ):
        got, model, base, _, _ = oracle(patches)

        def put(activation, hook, formula=formula):
            activation[:, 2] = formula(activation[:, 2].clone())

        with torch.no_grad():
            expected = model.run_with_hooks(base, fwd_hooks=[("blocks.1.hook_resid_mid", put)])
        assert_close_to(got, expected, atol=1e-12)


def test_entries_of_a_pattern_in_any_order():
    given = noise(3, 2, 2, 3)
    got, model, base, _, _ = oracle(
        Patch("pattern", 1, pos=[5, 3], head=[2, 0], key_pos=[3, 0, 1], source=given)
    )

    def put(pattern, hook):
        for i, head in enumerate([2, 0]):
            for j, query in enumerate([5, 3]):
                for k, key in enumerate([3, 0, 1]):
                    pattern[:, head, query, key] = given[:, i, j, k]

    with torch.no_grad():
        expected = model.run_with_hooks(base, fwd_hooks=[("blocks.1.attn.hook_pattern", put)])
    assert_close_to(got, expected, atol=1e-12)


def test_materialised_runs_look_at_every_pattern():
    how, _ = made()
    seen = []
    for layer in range(3):
        point = how.model.blocks[layer].attn.hook_pattern
        point.add_hook(lambda activation, hook: seen.append(hook.name))
    how.alone(RUNS[0], materialise=True)
    assert seen == [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
