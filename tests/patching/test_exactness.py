"""Random patch sets, odd shapes and low precision: the wave is a hooked run, or it is wrong."""

import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastlens.patching import Patch
from fastlens.patching.execute import hooked_runs
from fastlens.patching.sites import SITES, available_sites, n_heads
from tests.models import ours, prompts
from tests.patching.against_hooks import (
    MODES,
    SOURCES,
    check,
    every_activation,
    go_together,
    hooked_logits,
    least_memory,
    mask_of,
    mixed_runs,
    pairs,
    planned,
    source_of,
    wave_logits,
    width_of,
)

N_POS = 6
MODELS = {
    name: ours(name, dtype=torch.float64)
    for name in ("gpt2", "llama", "neox", "local", "qk_norm", "alibi")
}
SITES_OF = {name: available_sites(m.cfg, m.hook_dict) for name, m in MODELS.items()}
HEADS = {name: {s: n_heads(SITES[s], MODELS[name].cfg) for s in SITES_OF[name]} for name in MODELS}
CACHES = {
    (name, batch): every_activation(model, batch, N_POS)
    for name, model in MODELS.items()
    for batch in (1, 2)
}


def some_of(draw, size):
    """None, or entries of an axis in any order."""
    return draw(st.none() | st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True))


@st.composite
def patches(draw, name, batch):
    """Arguments of a `Patch`. No call into fastlens here: checking its types draws random numbers,
    which a strategy must not."""
    cfg = MODELS[name].cfg
    site = draw(st.sampled_from(SITES_OF[name]))
    mode = draw(st.sampled_from(MODES))
    kind = draw(st.sampled_from([k for k in SOURCES if batch > 1 or k != "resample"]))
    if site == "attn_scores" and mode == "scale":
        kind = "number"  # -inf times zero, or times a score of either sign, is no score
    sizes = {"pos": N_POS, "head": HEADS[name][site], "neuron": cfg.d_mlp, "key_pos": N_POS}
    axes = [axis.removeprefix("query_") for axis in SITES[site].axes]
    where = {axis: some_of(draw, sizes[axis]) for axis in axes}
    layer, seed = draw(st.integers(0, cfg.n_layers - 1)), draw(st.integers(0, 10**6))
    return {"site": site, "layer": layer, "mode": mode, "source": (kind, seed), **where}


def made(arguments, name, batch):
    """The `Patch` of what `patches` drew."""
    kind, seed = arguments["source"]
    site, model = arguments["site"], MODELS[name]
    # Values along the activation's own last axis, or along its keys or neurons if all are patched.
    axis = SITES[site].axes[-1]
    width = width_of(model, site)
    if axis in ("key_pos", "neuron") and arguments[axis] is None:
        width = N_POS if axis == "key_pos" else model.cfg.d_mlp
    return Patch(**{**arguments, "source": source_of(kind, seed, CACHES[name, batch], width)})


@pytest.mark.parametrize("name", list(MODELS))
@settings(max_examples=20)
@given(data=st.data())
def test_random_patch_sets(name, data):
    batch = data.draw(st.sampled_from([1, 2]))
    drawn = data.draw(
        st.lists(st.lists(patches(name, batch), min_size=1, max_size=5), min_size=1, max_size=4)
    )
    runs = [[made(one, name, batch) for one in run] for run in drawn]
    assume(all(go_together(run) for run in runs))
    reads = data.draw(st.lists(st.integers(0, N_POS - 1), min_size=1, max_size=2, unique=True))
    padding = data.draw(st.sampled_from(["none", "left", "right"]))
    # Some pairs agree everywhere, some nowhere.
    clean, corrupted = pairs(batch, N_POS)
    how = data.draw(st.sampled_from(["pairs", "pairs", "same", "other"]))
    corrupted = {"pairs": corrupted, "same": clean.clone(), "other": prompts(batch, N_POS, 3)}[how]
    query = planned(
        *(MODELS[name], clean, corrupted, runs),
        reads=sorted(reads),
        mask=mask_of(padding, batch, N_POS),
        direction=data.draw(st.sampled_from(["denoising", "noising"])),
    )
    expected = check(query)
    if query.plan.order:
        check(
            planned(
                *(MODELS[name], clean, corrupted, runs),
                reads=sorted(reads),
                mask=mask_of(padding, batch, N_POS),
                direction=query.direction,
                memory=least_memory(query),
            ),
            expected,
        )


# -- odd shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"n_layers": 1}),
        ("neox", {"n_layers": 1}),
        ("attn_only", {"n_layers": 1}),
        ("gpt2", {"n_heads": 1, "d_head": 32}),
        ("gpt2", {"d_mlp": 1}),
        ("llama", {"d_mlp": 1, "n_layers": 2}),
        ("solu_ln", {"d_mlp": 2}),
        ("gpt2", {"d_head": 1, "n_heads": 3}),
        ("alibi", {"d_head": 1}),
        ("llama", {"n_heads": 2, "n_key_value_heads": 1, "d_head": 2, "rotary_dim": 2}),
        ("local", {"window_size": 1}),
        ("local", {"window_size": 2, "attn_types": ["local", "local"]}),
        ("gpt2", {"n_layers": 6}),
    ],
)
def test_odd_models(name, changes):
    model = ours(name, dtype=torch.float64, **changes)
    cache = every_activation(model, 2, N_POS)
    runs = mixed_runs(model, 2, N_POS, cache, n_multi=6)
    if model.cfg.n_layers == 1:
        runs = runs[:-2]
    clean, corrupted = pairs(2, N_POS)
    query = planned(model, clean, corrupted, runs)
    check(planned(model, clean, corrupted, runs, memory=least_memory(query)), check(query))


@pytest.mark.parametrize(
    ("name", "n_pos", "direction"),
    [
        ("gpt2", 1, "denoising"),
        ("llama", 2, "noising"),
        ("neox", 1, "noising"),
        ("alibi", 2, "denoising"),
        ("bidirectional", 2, "noising"),
        ("shortformer", 1, "denoising"),
    ],
)
def test_prompts_of_one_and_two_tokens(name, n_pos, direction):
    model = ours(name, dtype=torch.float64, n_layers=2)
    clean, corrupted = pairs(2, n_pos)
    ways = (("other", "replace"), (0.5, "scale"), ("mean", "add"))
    runs = [
        Patch(site, layer, source=ways[number % 3][0], mode=ways[number % 3][1])
        for number, site in enumerate(available_sites(model.cfg, model.hook_dict))
        for layer in range(2)
    ]
    check(planned(model, clean, corrupted, runs, direction=direction))


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("reads", [(0,), (1,), (0, 5), tuple(range(N_POS))])
def test_any_needed_position(name, reads):
    model = MODELS[name]
    clean, corrupted = pairs(2, N_POS)
    cache = CACHES[name, 2]
    check(planned(model, clean, corrupted, mixed_runs(model, 2, N_POS, cache), reads=reads))


def test_patches_behind_the_last_position_that_is_read_are_dead():
    model = MODELS["gpt2"]
    clean, corrupted = pairs(2, N_POS)
    runs = [Patch(site, 0, pos=[3, 5], source="zero") for site in ("resid_pre", "k", "mlp_post")]
    query = planned(model, clean, corrupted, runs, reads=(2,))
    assert query.plan.frame.n_pos == 3 and set(query.plan.why_not.values()) == {"dead"}
    check(query)
    # So are keys that no row sees which is kept.
    runs = [Patch("attn_scores", 0, key_pos=[4], mode="add"), Patch("pattern", 0, key_pos=[5, 2])]
    query = planned(model, clean, corrupted, runs, reads=(2,))
    assert query.plan.frame.n_pos == 3
    check(query)
    # A pattern that looks ahead brings those positions back.
    ahead = Patch("pattern", 1, pos=2, key_pos=5, source=0.5)
    query = planned(model, clean, corrupted, [[Patch("v", 1, pos=5), ahead], [ahead]], reads=(2,))
    assert query.plan.frame.n_pos == N_POS and not query.plan.why_not
    logits = check(query)
    assert float((logits[0] - logits[1]).abs().max()) > 1e-4


def test_identical_pairs_have_nothing_to_do():
    model = MODELS["llama"]
    clean, _ = pairs(2, N_POS)
    runs = [
        Patch(site, layer)
        for site in available_sites(model.cfg, model.hook_dict)
        for layer in range(3)
    ]
    query = planned(model, clean, clean.clone(), runs)
    assert not query.plan.order and set(query.plan.why_not.values()) == {"null"}
    check(query)
    # One pair of the batch differs: the other one is still null.
    other = clean.clone()
    other[1, 3] = (other[1, 3] + 1) % 50
    query = planned(model, clean, other, runs)
    assert query.plan.frame.first_difference == (N_POS, 3)
    logits = check(query)
    base = model(other)[:, -1:]
    assert torch.equal(logits[:, 0].argmax(-1), base[0].argmax(-1).expand(len(runs), 1))
    assert (wave_logits(query)[:, 0] - base[0]).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "post_norm", "attn_only"])
def test_every_site_of_every_layer_in_one_run(name):
    model = ours(name, dtype=torch.float64)
    sites = [s for s in available_sites(model.cfg, model.hook_dict) if s != "attn_in"]
    clean, corrupted = pairs(2, N_POS)

    def everywhere(pos, source, mode):
        return [
            Patch(site, layer, pos=pos, source=source, mode=mode)
            for layer in reversed(range(model.cfg.n_layers))
            for site in sites
        ]

    runs = [
        everywhere(4, "other", "replace"),
        everywhere(None, "other", "replace"),
        everywhere(3, 0.9, "scale"),
        everywhere([5, 1], 0.01, "add"),
        everywhere(4, "other", "replace") + everywhere(2, 0.9, "scale") + everywhere(5, 0.1, "add"),
    ]
    check(planned(model, clean, corrupted, runs))


def test_a_hundred_patches_in_one_run():
    model = MODELS["gpt2"]
    rng = random.Random(0)
    clean, corrupted = pairs(2, N_POS)
    run = [
        Patch(
            *(
                rng.choice(("resid_pre", "q", "k", "v", "z", "mlp_post", "pattern")),
                rng.randrange(3),
            ),
            pos=rng.randrange(N_POS),
            source=rng.choice(("other", "zero", "mean", 0.5)),
            mode=rng.choice(MODES),
        )
        for _ in range(100)
    ]
    check(planned(model, clean, corrupted, [run, run[::-1]]))


@pytest.mark.parametrize(
    "site", ["resid_pre", "k", "z", "pattern", "result", "mlp_post", "q_input"]
)
def test_one_entry_patched_twice(site):
    model = MODELS["gpt2"]
    clean, corrupted = pairs(2, N_POS)
    where = {"pos": 3}
    other = Patch(site, 1, **where)
    half = Patch(site, 1, **where, source=0.5, mode="scale")
    generator = torch.Generator().manual_seed(0)
    last = {"pattern": N_POS, "mlp_post": model.cfg.d_mlp}.get(site, width_of(model, site))
    noise = torch.randn(last, generator=generator, dtype=torch.float64)
    more = Patch(site, 1, **where, source=noise, mode="add")
    zero = Patch(site, 1, pos=[3, 4], source="zero")
    runs = [[other], [other, half], [half, other], [other, more, half], [other, half, more],
            [more, more], [half, half], [zero, other], [other, zero],
            [zero, more, zero]]  # fmt: skip
    logits = check(planned(model, clean, corrupted, runs))
    assert torch.allclose(logits[0], logits[2], atol=1e-12)
    for a, b in ((0, 1), (3, 4), (7, 8)):
        assert float((logits[a] - logits[b]).abs().max()) > 1e-9, (a, b)


def test_a_tensor_over_what_is_selected_in_any_order():
    """Values follow the order in which positions, heads and keys are named."""
    model = MODELS["gpt2"]
    clean, corrupted = pairs(2, N_POS)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    runs = [
        Patch("z", 1, pos=[5, 2, 3], head=[3, 0], source=noise(2, 3, 2, 8)),
        Patch("z", 1, pos=[5, 2, 3], source=noise(3, 4, 8)),
        Patch("z", 1, head=[2, 1], source=noise(2, N_POS, 2, 8)),
        Patch("resid_pre", 1, pos=[4, 1], source=noise(2, 2, 32), mode="add"),
        Patch("mlp_post", 0, pos=[4, 1], neuron=[9, 3, 5], source=noise(2, 2, 3)),
        Patch("mlp_pre", 0, neuron=[9, 3, 5], source=noise(N_POS, 3)),
        Patch("pattern", 0, pos=[4, 1], head=[3, 2], key_pos=[2, 0, 1], source=noise(2, 2, 2, 3)),
        Patch("pattern", 1, key_pos=[2, 0], source=noise(2, 4, N_POS, 2), mode="scale"),
        Patch("attn_scores", 1, pos=[5, 3], source=noise(4, 2, N_POS)),
        Patch("attn_scores", 1, pos=[5, 3], source=noise(4, 2, N_POS), mode="add"),
        Patch("result", 1, pos=[5, 3], head=[2, 0], source=noise(2, 2, 2, 32)),
        Patch("q_input", 1, pos=[5, 3], head=[2, 0], source=noise(2, 2, 2, 32)),
        Patch("attn_in", 1, pos=[5, 3], source=noise(2, 4, 32), mode="add"),
        Patch("k", 1, pos=[3, 2], head=[1], source=noise(2, 2, 1, 8)),
    ]
    check(planned(model, clean, corrupted, runs))


# -- low precision -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gpt2", torch.bfloat16), ("llama", torch.bfloat16), ("neox", torch.float16)],
)
def test_half_precision_errs_no_more_than_hooked_runs_do(name, dtype):
    """At most four times what one run differs from itself between batch sizes and kernels."""
    model = ours(name, dtype=dtype)
    clean, corrupted = pairs(3, N_POS)
    sites = ("resid_pre", "attn_out", "q", "k", "v", "z", "result", "mlp_post", "mlp_out")
    runs = [
        Patch(site, number % 2, pos=(2, 5, None)[number % 3], source=source)
        for number, site in enumerate(sites)
        for source in ("other", "zero")
    ]
    query = planned(model, clean, corrupted, runs)
    alone = hooked_logits(query)
    needed = list(query.plan.frame.needed)
    with torch.no_grad():
        how = hooked_runs(query, query.runs)
        in_full = torch.stack([how.alone(r, materialise=True)[:, needed] for r in query.runs])
    one_by_one = torch.cat(
        [
            hooked_logits(planned(model, clean[i : i + 1], corrupted[i : i + 1], runs))
            for i in range(3)
        ],
        1,
    )
    noise = max(float((alone - other).abs().max()) for other in (in_full, one_by_one))
    assert noise > 0
    difference = float((wave_logits(query) - alone).abs().max())
    assert difference <= 4 * noise, (difference, noise)
