"""Where cached values are the run's own."""

import pytest
import torch

from fastlens.patching import Patch, sweep
from fastlens.patching.equal import equality
from fastlens.patching.runs import PlannedPatch, Run
from fastlens.patching.sites import SITES
from fastlens.patching.sources import Source
from fastlens.patching.sweep import patched_metrics
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


def test_a_cache_of_another_shape_or_with_nan_is_nowhere_equal():
    model, tokens = ours("gpt2"), prompts(1, 5)
    name = "blocks.1.hook_resid_pre"
    with torch.no_grad():
        _, own = model.run_with_cache(tokens, names_filter=name)
    patch = PlannedPatch("resid_pre", 1, value=1)

    def null_of(value):
        sources = [Source("other", "other"), Source("cache", "a cache", cache={name: value})]
        return equality(model, tokens, [Run((0,), (patch,))], sources)[1](patch, 0)

    assert null_of(own[name]) == frozenset(range(5))
    assert null_of(own[name][:, :4]) == frozenset()
    # A value that is not even itself must be put in, to be seen.
    unreal = own[name].clone()
    unreal[0, 2, 7] = torch.nan
    assert null_of(unreal) == frozenset({0, 1, 3, 4})
    nearly = own[name].clone()
    nearly[0, 3, 7] = torch.nextafter(nearly[0, 3, 7], torch.tensor(torch.inf))
    assert null_of(nearly) == frozenset({0, 1, 2, 4})


def one_by_one(model, tokens, runs):
    """Last logits of each run, with hooks as a user would write them."""
    rows = []
    for patches in runs:
        hooks = []
        for patch in patches:
            name = SITES[patch.site].hook_name(patch.layer)

            def put(activation, hook, patch=patch):
                activation[:, patch.pos] = patch.source[hook.name][:, patch.pos]

            hooks.append((name, put))
        with torch.no_grad():
            rows.append(model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1, 3])
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_runs_from_a_cache_are_the_runs_alone(name):
    """Null at some places, live at others, and null behind a live one in the same run."""
    model = ours(name, dtype=torch.float64)
    tokens, clean = prompts(2, 6), prompts(2, 6)
    clean[0, 3] = (clean[0, 3] + 5) % 50
    clean[1, 4] = (clean[1, 4] + 5) % 50
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    sites = ("resid_pre", "resid_post", "attn_out", "v", "z", "mlp_post", "mlp_out")
    runs = [
        [Patch(site, layer, pos=pos, source=cache)]
        for site in sites
        for layer in range(model.cfg.n_layers)
        for pos in range(6)
    ]
    edited = {key: cache[key] for key in cache.keys()}  # noqa: SIM118
    edited["blocks.0.hook_resid_pre"] = edited["blocks.0.hook_resid_pre"] + 1.0
    edited["blocks.1.hook_resid_pre"] = edited["blocks.1.hook_resid_pre"] * 0.5
    live = Patch("resid_pre", 0, pos=1, source=edited)
    runs += [[live, Patch("z", 1, pos=2, source=cache)], [live, Patch("v", 0, pos=0, source=cache)]]
    # What goes by one hook's name is not the equal activation of another name.
    runs += [[Patch("resid_post", 0, pos=5, source=edited)]]
    runs += [[Patch("resid_pre", 1, pos=5, source=edited)]]
    got = patched_metrics(model, tokens, runs, lambda x: x[:, -1, 3], verify="all", progress=False)
    expected = one_by_one(model, tokens, runs)
    assert float((got - expected).abs().max()) <= 1e-12
    assert float((got[-1] - got[-2]).abs().min()) > 1e-6
    # Null runs are one and the same number, to the bit.
    null = [number for number, (patch, *more) in enumerate(runs) if not more and patch.pos < 3]
    assert len(null) > 30 and torch.equal(got[null[1:]], got[null[:-1]])


def test_a_cache_that_holds_only_resid_post():
    """``resid_post`` is not looked up as the next layer's ``resid_pre``."""
    model = ours("gpt2", dtype=torch.float64)
    tokens, clean = prompts(1, 5), prompts(1, 5, 1)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=lambda n: n.endswith("resid_post"))
    runs = [[Patch("resid_post", la, pos=pos, source=cache)] for la in range(3) for pos in range(5)]
    got = patched_metrics(model, tokens, runs, lambda x: x[:, -1, 3], verify=0, progress=False)
    assert float((got - one_by_one(model, tokens, runs)).abs().max()) <= 1e-12
    swept = sweep(model, clean, tokens, sites="resid_post", source=cache, verify="all",
                  metric=lambda x: x[:, -1, 3])  # fmt: skip
    assert float((swept.values.flatten() - got[:, 0]).abs().max()) <= 1e-12


def test_resid_post_of_a_cache_and_of_the_other_prompt_in_one_run():
    """Names are resolved all or none: else two patches of one place would change places."""
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = prompts(1, 5, 1), prompts(1, 5)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts(1, 5, 2))
    other = Patch("resid_post", 0, pos=3)
    cached = Patch("resid_post", 0, pos=3, source=cache)
    scores = sweep(
        *(model, clean, corrupted),
        runs=[[other, cached], [cached, other], [other], [cached]],
        metric=lambda x: x[:, -1, 3],
        verify="all",
    )
    one, two, last_other, last_cached = scores.values.tolist()
    assert one == pytest.approx(last_cached, abs=1e-12)
    assert two == pytest.approx(last_other, abs=1e-12)
    assert abs(one - two) > 1e-6
