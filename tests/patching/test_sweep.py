"""Sweeps against one run at a time by `run_with_hooks`, and what surrounds them."""

import inspect
import itertools
import math
import re
import sys

import pytest
import torch
import torch.nn as nn

from fastlens import HookedTransformer
from fastlens.errors import FastlensError, MetricError, SourceError, SweepError
from fastlens.patching import (
    Patch,
    answer_logit,
    answer_prob,
    cross_entropy,
    execute,
    kl_divergence,
    logit_diff,
    plan,
    sweep,
)
from fastlens.patching.sites import SITES, available_sites
from fastlens.patching.wave import Wave
from fastlens.scores import Scores
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS, tiny
from tests.fixtures_tokens import gpt2_like
from tests.models import ours, prompts, randomise, theirs
from tests.patching.texts import text_model

N_POS = 5
METRIC = logit_diff(7, 3)
DIRECTIONS = ("denoising", "noising")


def pair(batch=1, n_pos=N_POS, first_difference=1):
    """Clean and corrupted tokens that agree before ``first_difference``."""
    clean = prompts(batch, n_pos)
    corrupted = clean.clone()
    corrupted[:, first_difference] = (corrupted[:, first_difference] + 7) % 50
    corrupted[:, -2] = (corrupted[:, -2] + 11) % 50
    return clean, corrupted


def one_by_one(model, base, source_tokens, site, by, metric, cover=None):
    """The sweep as a user would write it: a loop of `run_with_hooks` over all cells.

    It shares no code with the library's, not even that of its own check.

    ``cover``: for axes outside ``by``, the entries that are patched (default all).
    """
    axes = SITES[site].axes
    names = [SITES[site].hook_name(layer) for layer in range(model.cfg.n_layers)]
    _, source = model.run_with_cache(source_tokens, names_filter=names)
    sizes = dict(zip(axes, source[names[0]].shape[1:], strict=False))
    sizes["layer"] = model.cfg.n_layers
    rows = []
    for cell in itertools.product(*(range(sizes[axis]) for axis in by)):
        at = dict(zip(by, cell, strict=True))
        name = names[at["layer"]]

        def patch(activation, hook, at=at, name=name):
            mask = torch.ones(activation.shape[1 : 1 + len(axes)], dtype=torch.bool)
            for dim, axis in enumerate(axes):
                kept = [at[axis]] if axis in at else (cover or {}).get(axis, range(sizes[axis]))
                chosen = torch.zeros(sizes[axis], dtype=torch.bool)
                chosen[list(kept)] = True
                mask &= chosen.view([-1 if d == dim else 1 for d in range(len(axes))])
            mask = mask.view(1, *mask.shape, *[1] * (activation.ndim - 1 - len(axes)))
            return torch.where(mask, source[name].to(activation), activation)

        with torch.no_grad():
            logits = model.run_with_hooks(base, fwd_hooks=[(name, patch)])
        rows.append(metric(logits))
    values = torch.stack(rows, -1)
    return values.unflatten(-1, [sizes[axis] for axis in by])


def gap(model, clean, corrupted, metric):
    with torch.no_grad():
        return float((metric(model(clean)) - metric(model(corrupted))).mean().abs())


# -- exactness -----------------------------------------------------------------------------------


CASES = [
    *itertools.product(("gpt2", "llama"), (1, 3), DIRECTIONS),
    *itertools.product(("neox", "attn_only"), (1,), ("denoising",)),
    *itertools.product(("neox", "attn_only"), (3,), ("noising",)),
]


@pytest.mark.parametrize(("name", "batch", "direction"), CASES)
def test_every_site_equals_one_run_at_a_time(name, batch, direction):
    model = ours(name, dtype=torch.float64, n_layers=2)
    clean, corrupted = pair(batch, n_pos=3)
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    for site in available_sites(model.cfg, model.hook_dict):
        scores = sweep(
            model, clean, corrupted, sites=site, metric=METRIC, direction=direction, verify=False
        )
        expected = one_by_one(model, base, source, site, scores.axes, METRIC)
        assert_close_to(scores.per_example, expected, atol=1e-12, name=site)
        assert_close_to(scores.values, expected.mean(0), atol=1e-12, name=site)
        effect = (scores.values - scores.reference).abs().max()
        assert effect > 1e-6, f"{site}: a sweep without effects tests nothing"


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_float32(name):
    model = ours(name, n_layers=2)
    precise = ours(name, n_layers=2).double()
    clean, corrupted = pair(3, n_pos=4)
    bound = 1e-4 * max(1.0, gap(model, clean, corrupted, METRIC))
    for site in ("resid_pre", "attn_out", "k", "z", "pattern", "mlp_post", "result"):
        scores = sweep(model, clean, corrupted, sites=site, metric=METRIC, verify=2)
        truth = sweep(precise, clean, corrupted, sites=site, metric=METRIC, verify=False)
        assert_close_to(scores.per_example, truth.per_example, atol=bound, name=site)
        assert scores.certificate["max_difference"] <= bound


@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_every_mechanism(name):
    model = ours(name, dtype=torch.float64)
    # Longer than the shortest attention window.
    clean, corrupted = pair(2, n_pos=8)
    for site, by in (("resid_pre", "layer"), ("k", ("layer", "head")), ("z", ("layer", "head"))):
        scores = sweep(model, clean, corrupted, sites=site, by=by, positions=[1, 6], metric=METRIC)
        cover = {"pos": [1, 6]}
        expected = one_by_one(model, corrupted, clean, site, scores.axes, METRIC, cover)
        assert_close_to(scores.per_example, expected, atol=1e-12, name=site)


@pytest.mark.parametrize(
    ("site", "by"),
    [
        ("resid_pre", ("layer",)),
        ("resid_pre", ("pos", "layer")),
        ("z", ("layer", "pos")),
        ("z", ("layer", "pos", "head")),
        ("k", ("head", "layer", "pos")),
        ("v", ("layer",)),
        ("pattern", ("layer", "head", "query_pos")),
        ("pattern", ("layer", "key_pos")),
        ("pattern", ("layer", "head", "query_pos", "key_pos")),
        ("attn_scores", ("layer", "head", "query_pos")),
        ("mlp_post", ("layer", "neuron")),
    ],
)
def test_every_axis(site, by):
    model = ours("llama", dtype=torch.float64, d_mlp=12, n_layers=2)
    clean, corrupted = pair(2, n_pos=4)
    scores = sweep(model, clean, corrupted, sites=site, by=by, metric=METRIC, verify=False)
    assert scores.axes == by
    expected = one_by_one(model, corrupted, clean, site, by, METRIC)
    assert_close_to(scores.per_example, expected, atol=1e-12)


def test_the_memory_does_not_change_the_result():
    model = ours("neox", dtype=torch.float64)
    clean, corrupted = pair(2)
    default = sweep(model, clean, corrupted, metric=METRIC)
    with pytest.raises(SweepError, match="too little") as caught:
        sweep(model, clean, corrupted, metric=METRIC, memory=1)
    least = int(re.search(r"at least ([\d,]+)", str(caught.value))[1].replace(",", ""))
    chunks = []
    for memory in (least, least + 20_000, f"{-(-least // 2**20) + 1}MiB"):
        other = sweep(model, clean, corrupted, metric=METRIC, memory=memory)
        assert_close_to(other.values, default.values, atol=1e-12)
        chunks.append(other.plan["chunks"])
    assert chunks[0] > chunks[1] > chunks[2] == default.plan["chunks"] == 1


def test_restrictions():
    model = ours("llama", dtype=torch.float64)
    clean, corrupted = pair(2)
    whole = sweep(model, clean, corrupted, sites="z", by=("layer", "pos", "head"), metric=METRIC)
    part = sweep(
        model,
        clean,
        corrupted,
        sites="z",
        by=("layer", "pos", "head"),
        metric=METRIC,
        layers=[2, 0],
        positions=slice(-2, None),
        heads=3,
    )
    assert_close_to(part.values, whole.values[[2, 0]][:, -2:, 3:4], atol=1e-12)
    assert part.labels == {"layer": ["L2", "L0"], "pos": ["3", "4"], "head": ["H3"]}


def test_restrictions_outside_by_narrow_the_patch():
    model = ours("llama", dtype=torch.float64)
    clean, corrupted = pair(2)
    scores = sweep(
        model,
        clean,
        corrupted,
        sites="q",
        metric=METRIC,
        by="layer",
        positions=[1, 4],
        heads=[0, 3],
    )
    expected = one_by_one(
        model, corrupted, clean, "q", ("layer",), METRIC, {"pos": [1, 4], "head": [0, 3]}
    )
    assert_close_to(scores.per_example, expected, atol=1e-12)
    scores = sweep(model, clean, corrupted, sites="pattern", metric=METRIC, positions=-1)
    expected = one_by_one(
        model, corrupted, clean, "pattern", ("layer", "head"), METRIC, {"query_pos": [4]}
    )
    assert_close_to(scores.per_example, expected, atol=1e-12)


def test_several_sites_share_a_result():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair()
    both = sweep(model, clean, corrupted, sites=["attn_out", "mlp_out"], metric=METRIC)
    assert both.axes == ("site", "layer", "pos")
    for site in ("attn_out", "mlp_out"):
        one = sweep(model, clean, corrupted, sites=site, metric=METRIC)
        assert_close_to(both.select(site=site).values, one.values, atol=1e-12)


def test_known_answers():
    """All of layer 0's stream patched is the clean run; positions before the first difference, and
    the last layer's other positions, change nothing."""
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair(1, first_difference=2)
    scores = sweep(model, clean, corrupted, by="layer", metric=METRIC)
    assert_close_to(scores.values, METRIC(model(clean)).expand(3), atol=1e-12)
    scores = sweep(model, clean, corrupted, sites="resid_post", metric=METRIC)
    base = METRIC(model(corrupted))
    assert_close_to(scores.values[:, :2], base.expand(3, 2), atol=1e-12)
    assert_close_to(scores.values[2, :4], base.expand(4), atol=1e-12)
    assert_close_to(scores.values[2, 4:], METRIC(model(clean)), atol=1e-12)


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_against_transformer_lens_patching(name):
    pytest.importorskip("transformer_lens")
    from transformer_lens import patching as tl_patching

    reference = theirs(name, n_layers=2)
    model = ours(name, n_layers=2)
    clean, corrupted = pair(2, n_pos=4)

    def metric(logits):
        return (logits[:, -1, 7] - logits[:, -1, 3]).mean()

    with torch.no_grad():
        _, cache = reference.run_with_cache(clean)
        functions = {
            ("resid_pre", None): tl_patching.get_act_patch_resid_pre,
            ("attn_out", None): tl_patching.get_act_patch_attn_out,
            ("mlp_out", None): tl_patching.get_act_patch_mlp_out,
            ("z", None): tl_patching.get_act_patch_attn_head_out_all_pos,
            ("v", None): tl_patching.get_act_patch_attn_head_v_all_pos,
            ("z", ("layer", "pos", "head")): tl_patching.get_act_patch_attn_head_out_by_pos,
            ("k", ("layer", "pos", "head")): tl_patching.get_act_patch_attn_head_k_by_pos,
            ("pattern", None): tl_patching.get_act_patch_attn_head_pattern_all_pos,
            (
                "pattern",
                ("layer", "head", "query_pos"),
            ): tl_patching.get_act_patch_attn_head_pattern_by_pos,
        }
        for (site, by), function in functions.items():
            expected = function(reference, corrupted, cache, metric)
            scores = sweep(model, clean, corrupted, sites=site, by=by, metric=metric)
            assert_close_to(scores.values, expected, atol=1e-4, name=f"{site} by {scores.axes}")


@pytest.mark.tl
def test_a_transformer_lens_model_can_be_swept():
    pytest.importorskip("transformer_lens")
    model, reference = ours("gpt2"), theirs("gpt2")
    clean, corrupted = pair(2)
    assert_close_to(
        sweep(reference, clean, corrupted, sites="z", metric=METRIC, verify="all").values,
        sweep(model, clean, corrupted, sites="z", metric=METRIC).values,
        atol=1e-4,
    )
    with pytest.raises(SweepError, match="nothing passes the hook point"):
        sweep(reference, clean, corrupted, sites="result", metric=METRIC)


# -- windows, runs one by one, sources -----------------------------------------------------------


def test_windows_patch_neighbouring_layers_together():
    model = ours("gpt2", dtype=torch.float64, n_layers=4)
    clean, corrupted = pair(2)
    scores = sweep(model, clean, corrupted, sites="mlp_out", window=3, metric=METRIC)
    by_hand = sweep(
        model,
        clean,
        corrupted,
        metric=METRIC,
        runs={
            f"{layer} {pos}": [
                Patch("mlp_out", one, pos=pos)
                for one in range(max(0, layer - 1), min(4, layer + 2))
            ]
            for layer in range(4)
            for pos in range(N_POS)
        },
        verify="all",
    )
    assert scores.axes == ("layer", "pos")
    assert_close_to(scores.values.flatten(), by_hand.values, atol=1e-12)
    assert by_hand.labels["run"][:2] == ["0 0", "0 1"]
    single = sweep(model, clean, corrupted, sites="mlp_out", metric=METRIC)
    assert (scores.values - single.values).abs().max() > 1e-6


def test_a_window_of_one_layer_less_than_even_leans_down():
    """Meng et al.: as many layers below as above, the odd one below."""
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair()
    scores = sweep(model, clean, corrupted, sites="attn_out", by="layer", window=2, metric=METRIC)
    runs = [[Patch("attn_out", layer) for layer in pair_] for pair_ in ([0], [0, 1], [1, 2])]
    expected = sweep(model, clean, corrupted, runs=runs, metric=METRIC)
    assert_close_to(scores.values, expected.values, atol=1e-12)


def test_runs_by_name_may_mix_everything():
    model = ours("llama", dtype=torch.float64)
    clean, corrupted = pair(3)
    vector = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
    _, cache = model.run_with_cache(prompts(3, N_POS, seed=4))
    runs = {
        "two heads off": [
            Patch("z", 0, head=[1, 2], source="zero"),
            Patch("z", 1, head=0, source="zero"),
        ],
        "steered": Patch("resid_post", 1, pos=-1, source=vector, mode="add"),
        "halved": Patch("mlp_out", -1, source=0.5, mode="scale"),
        "mean": Patch("resid_pre", 1, source="mean"),
        "another's": Patch("k", 0, source="resample"),
        "cached": Patch("attn_out", 1, source=cache.cache_dict),
    }
    scores = sweep(model, clean, corrupted, runs=runs, metric=METRIC, verify="all")
    assert scores.axes == ("run",) and scores.labels == {"run": list(runs)}
    assert scores.certificate["max_difference"] <= 1e-12
    assert bool(((scores.values - scores.reference).abs() > 1e-6).all())

    def steered(resid, hook):
        resid[:, -1] += vector
        return resid

    def halved(out, hook):
        return 0.5 * out

    for name, hook in (
        ("steered", ("blocks.1.hook_resid_post", steered)),
        ("halved", (f"blocks.{model.cfg.n_layers - 1}.hook_mlp_out", halved)),
    ):
        with torch.no_grad():
            expected = METRIC(model.run_with_hooks(corrupted, fwd_hooks=[hook]))
        found = scores.per_example[:, scores.labels["run"].index(name)]
        assert_close_to(found, expected, atol=1e-12, name=name)


def test_noising_is_denoising_with_the_prompts_changed_over():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair(2)
    noised = sweep(model, clean, corrupted, sites="z", metric=METRIC, direction="noising")
    swapped = sweep(model, corrupted, clean, sites="z", metric=METRIC)
    assert_close_to(noised.values, swapped.values, atol=0)
    assert noised.reference == pytest.approx(swapped.reference)
    assert noised.baselines["clean"] == swapped.baselines["corrupted"]


# -- pairs of different lengths ------------------------------------------------------------------

# Every pair differs somewhere else, and the last token is each prompt's own.
RAGGED = [
    ("the cat in a can", "the can in a cat"),
    ("a cat on the can", "a cat in the can"),
    ("in the cat", "on the cat"),
]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pairs_of_different_lengths_are_each_as_alone(direction):
    model = HookedTransformer(tiny("gpt2", d_vocab=300, dtype=torch.float64), tokenizer=gpt2_like())
    randomise(model)
    clean, corrupted = (list(texts) for texts in zip(*RAGGED, strict=True))
    answers = [" the", " a", " c"]
    options = {"sites": "resid_pre", "direction": direction}
    together = sweep(
        model, clean, corrupted, metric=logit_diff(answers, " cat"), verify="all", **options
    )
    n_pos = together.values.shape[1]
    assert together.labels["pos"] == [str(i - n_pos) for i in range(n_pos)]
    lengths = set()
    for i, (one, other) in enumerate(RAGGED):
        alone = sweep(model, one, other, metric=logit_diff(answers[i], " cat"), **options)
        length = alone.values.shape[1]
        lengths.add(length)
        assert_close_to(together.per_example[i][:, n_pos - length :], alone.values, atol=1e-12)
        # Padding is masked: patching it changes nothing, to the bit.
        padding = together.per_example[i][:, : n_pos - length]
        assert bool((padding == padding.flatten()[:1]).all()) if padding.numel() else True
    assert len(lengths) > 1, "pairs of one length test nothing"


def test_an_attention_mask_hides_tokens():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair(2)
    padded = [torch.cat([torch.full((2, 2), 9), tokens], 1) for tokens in (clean, corrupted)]
    mask = torch.tensor([[0, 0, *[1] * N_POS]] * 2)
    plain = sweep(model, clean, corrupted, metric=METRIC)
    scores = sweep(model, *padded, attention_mask=mask, metric=METRIC, verify="all")
    assert_close_to(scores.values[:, 2:], plain.values, atol=1e-12)
    unmasked = sweep(model, *padded, metric=METRIC)
    assert (unmasked.values[:, 2:] - plain.values).abs().max() > 1e-6


# -- padding, hooks and modules of the user's ----------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    tokenizer = gpt2_like()
    model = HookedTransformer(
        tiny("llama", d_vocab=300, dtype=torch.float64),
        tokenizer=tokenizer,
        default_padding_side=side,
    )
    randomise(model)
    clean, corrupted = pair(2, n_pos=6)
    for tokens in (clean, corrupted):
        tokens[0, slice(0, 2) if side == "left" else slice(4, 6)] = model.tokenizer.pad_token_id
    metric = logit_diff(7, 3, position=3)
    for site in ("resid_pre", "v", "pattern"):
        scores = sweep(model, clean, corrupted, sites=site, metric=metric, verify=False)
        expected = one_by_one(model, corrupted, clean, site, scores.axes, metric)
        assert_close_to(scores.per_example, expected, atol=1e-12, name=site)


def _steer(x, hook):
    return x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)


def _looks_at_the_batch(x, hook):
    return x - x.mean(0, keepdim=True)


class _Counts:
    """A hook with a state of its own."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, hook):
        self.calls += 1
        return x * 1.5


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        (_steer, "blocks.1.hook_resid_pre"),
        (_looks_at_the_batch, "blocks.0.hook_mlp_out"),
        (_looks_at_the_batch, "hook_embed"),
        (_Counts(), "blocks.1.attn.hook_pattern"),
    ],
)
def test_hooks_of_the_users_are_part_of_every_run(hook, place):
    model = ours("gpt2", dtype=torch.float64, n_layers=2)
    clean, corrupted = pair(2, n_pos=4)
    plain = sweep(model, clean, corrupted, metric=METRIC)
    model.add_hook(place, hook)
    scores = sweep(model, clean, corrupted, metric=METRIC)
    expected = one_by_one(model, corrupted, clean, "resid_pre", scores.axes, METRIC)
    assert_close_to(scores.per_example, expected, atol=1e-12)
    assert (scores.values - plain.values).abs().max() > 1e-6
    assert scores.plan["strategy"] == "one forward per run"
    assert place in scores.plan["because"]
    assert len(model.hook_dict[place].fwd_hooks) == 1
    assert plain.plan["strategy"] != scores.plan["strategy"]


def test_native_torch_hooks_count_too():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair(2)
    model.blocks[1].mlp.register_forward_hook(lambda module, args, out: out - out.mean(0))
    scores = sweep(model, clean, corrupted, metric=METRIC, sites="z")
    expected = one_by_one(model, corrupted, clean, "z", scores.axes, METRIC)
    assert_close_to(scores.per_example, expected, atol=1e-12)


def test_inside_a_hooks_context():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair()
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", _steer)]):
        scores = sweep(model, clean, corrupted, metric=METRIC)
        expected = one_by_one(model, corrupted, clean, "resid_pre", scores.axes, METRIC)
        assert len(model.hook_dict["blocks.1.hook_attn_out"].fwd_hooks) == 1
    assert_close_to(scores.per_example, expected, atol=1e-12)


def test_replaced_modules_are_run():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair()
    before = sweep(model, clean, corrupted, metric=METRIC)

    class Tripled(torch.nn.Module):
        def forward(self, x):
            return 3 * x

    model.blocks[1].mlp = Tripled()
    original = model.blocks[2].mlp.forward
    model.blocks[2].mlp.forward = lambda x: original(x) + 1.0
    scores = sweep(model, clean, corrupted, metric=METRIC)
    expected = one_by_one(model, corrupted, clean, "resid_pre", scores.axes, METRIC)
    assert_close_to(scores.per_example, expected, atol=1e-12)
    assert (scores.values - before.values).abs().max() > 1e-3


def test_everything_is_left_as_it_was():
    model = ours("gpt2")
    model.train()
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]
    hook = _Counts()
    model.add_perma_hook("hook_embed", hook)
    clean, corrupted = pair()

    def broken(logits):
        raise RuntimeError("mine")

    for metric in (METRIC, broken):
        with torch.enable_grad():
            try:
                scores = sweep(model, clean, corrupted, sites="result", metric=metric)
                assert not scores.values.requires_grad
            except RuntimeError as error:
                assert str(error) == "mine"
            assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == flags
        assert not model.cfg.use_attn_result
        assert list(model.list_hooks()) == ["hook_embed"]


def test_the_metric_runs_without_gradients_on_an_evaluating_model():
    model = ours("gpt2").train()
    seen = set()

    def metric(logits):
        seen.add((torch.is_grad_enabled(), model.training, logits.requires_grad, logits.shape))
        return logits[0, -1, 0]

    plan_ = plan(model, *pair(2), metric=metric)
    seen.clear()
    execute(plan_)
    assert seen == {(False, False, False, (2, N_POS, 50))}


# -- metrics in a sweep --------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "metric",
    [
        logit_diff([7, 2, 9], 3),
        logit_diff(7, 3, position=2),
        answer_logit(7),
        answer_prob([7, 8, 9], position=-2),
        cross_entropy(7),
    ],
)
def test_every_metric_per_example(metric, direction):
    model = ours("llama", dtype=torch.float64)
    clean, corrupted = pair(3)
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    scores = sweep(model, clean, corrupted, metric=metric, direction=direction)
    expected = one_by_one(model, base, source, "resid_pre", scores.axes, metric)
    assert_close_to(scores.per_example, expected, atol=1e-12)
    assert_close_to(scores.values, expected.mean(0), atol=1e-12)
    assert_close_to(scores.standard_error, expected.std(0) / math.sqrt(3), atol=1e-12)
    for name, tokens in (("clean", clean), ("corrupted", corrupted)):
        plain = metric(model(tokens)).mean().item()
        assert scores.baselines[name] == pytest.approx(plain)
    assert scores.reference == scores.baselines["corrupted" if base is corrupted else "clean"]
    assert scores.unit == metric.unit


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_is_from_the_clean_run_in_both_directions(direction):
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair(2)
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    scores = sweep(model, clean, corrupted, metric=kl_divergence(), direction=direction)
    metric = kl_divergence().with_clean(model(clean).detach())
    expected = one_by_one(model, base, source, "resid_pre", scores.axes, metric)
    assert_close_to(scores.per_example, expected, atol=1e-12)
    assert scores.baselines["clean"] == pytest.approx(0.0, abs=1e-12)
    assert bool((scores.values > -1e-12).all())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_normalised_scores_are_fractions_of_the_mean_gap(direction):
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair(3)
    normalised = logit_diff(7, 3, normalize=True)
    scores = sweep(model, clean, corrupted, metric=normalised, direction=direction)
    plain = sweep(model, clean, corrupted, metric=METRIC, direction=direction)
    low, high = plain.baselines["corrupted"], plain.baselines["clean"]
    assert_close_to(scores.values, (plain.values - low) / (high - low), atol=1e-9)
    assert_close_to(scores.per_example.mean(0), scores.values, atol=1e-12)
    assert scores.baselines == {"clean": 1.0, "corrupted": 0.0}
    assert scores.reference == (0.0 if direction == "denoising" else 1.0)
    assert scores.unit == "fraction of the clean-corrupted gap"
    assert scores.meta["clean_metric"] == pytest.approx(high)
    # All of layer 0 patched is the other run.
    whole = sweep(model, clean, corrupted, metric=normalised, direction=direction, by="layer")
    assert_close_to(whole.values[0], 1.0 - scores.reference, atol=1e-9)


def test_a_gap_of_zero_is_refused():
    clean, _ = pair(2)
    with pytest.raises(MetricError, match="fractions of their gap mean nothing"):
        sweep(ours("gpt2"), clean, clean, metric=logit_diff(7, 3, normalize=True))


def test_identical_prompts_change_nothing():
    model = ours("gpt2", dtype=torch.float64)
    clean, _ = pair(2)
    scores = sweep(model, clean, clean, metric=METRIC, sites="z")
    assert_close_to(scores.values, scores.reference * torch.ones(3, 4).double(), atol=1e-12)


def test_a_users_scalar_metric():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair(3)

    def loss(logits):
        return model.loss_fn(logits, clean)

    scores = sweep(model, clean, corrupted, metric=loss, sites="mlp_out")
    expected = one_by_one(model, corrupted, clean, "mlp_out", scores.axes, loss)
    assert_close_to(scores.values, expected, atol=1e-12)
    assert scores.per_example is None
    assert scores.standard_error is None
    assert scores.title == "denoising mlp_out, loss"


def test_a_metric_that_fails_names_the_run():
    clean, corrupted = pair()
    calls = []

    def sometimes(logits):
        calls.append(1)
        return logits[0, -1, 0] * (float("nan") if len(calls) == 5 else 1.0)

    with pytest.raises(MetricError, match="returned NaN for resid_pre, layer L0, pos 2"):
        sweep(ours("gpt2"), clean, corrupted, metric=sometimes)


def test_a_metric_of_changing_shape_is_refused():
    clean, corrupted = pair()
    calls = []

    def changing(logits):
        calls.append(1)
        return logits[:, -1, 0] if len(calls) < 4 else logits[0, -1, 0]

    with pytest.raises(MetricError, match="a scalar for some runs"):
        sweep(ours("gpt2"), clean, corrupted, metric=changing, verify=False)


def test_a_position_that_the_prompts_lack():
    with pytest.raises(MetricError, match="reads position 5, and the logits have 5 positions"):
        sweep(ours("gpt2"), *pair(), metric=answer_logit(0, position=5))


def test_half_precision_is_swept_and_checked():
    model = ours("llama", dtype=torch.bfloat16)
    clean, corrupted = pair(2)
    scores = sweep(model, clean, corrupted, metric=METRIC, sites="z", verify="all")
    assert scores.values.dtype == torch.float32
    assert scores.certificate["max_difference"] <= scores.certificate["tolerance"]


# -- the certificate -----------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch):
    """Grows by one with every forward of a whole model, hooked or not, and every wave."""
    calls = []
    # Not on HookedTransformer itself: a method replaced there is a reason not to run the wave.
    plain_call, wave_run = nn.Module.__call__, Wave.run

    def call(self, *args, **kwargs):
        calls.extend(["forward"] * isinstance(self, HookedTransformer))
        return plain_call(self, *args, **kwargs)

    def run(self, *args, **kwargs):
        calls.append("run")
        return wave_run(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", call)
    monkeypatch.setattr(Wave, "run", run)
    return calls


@pytest.mark.parametrize(
    ("verify", "runs"),
    [(None, 1), (1, 1), (0, 0), (False, 0), (True, 15), (4, 4), ("all", 15), (99, 15)],
)
def test_how_many_runs_are_verified(forwards, verify, runs):
    scores = sweep(ours("gpt2"), *pair(), metric=METRIC, verify=verify)
    assert scores.certificate["runs"] == runs == len(scores.certificate["checked"])
    assert ("max_difference" in scores.certificate) == (runs > 0)
    # To check, the other prompt's activations and one whole forward for each run.
    assert forwards == ["run"] + ["forward"] * (1 + runs if runs else 0)
    assert len(set(scores.certificate["checked"])) == runs


def test_the_strongest_run_is_verified_first():
    scores = sweep(ours("gpt2"), *pair(), metric=METRIC, verify=1)
    strongest = scores.top(1)[0]
    assert scores.certificate["checked"] == [
        f"resid_pre, layer {strongest.labels[0]}, pos {strongest.labels[1]}"
    ]
    assert scores.certificate["tolerance"] == pytest.approx(
        1e-4 * max(1.0, abs(scores.baselines["clean"] - scores.baselines["corrupted"]))
    )


class _MixesTheBatch(torch.nn.Module):
    """An MLP that no stack of runs can reproduce, and that no hook betrays."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True) + x.shape[0]


def test_a_model_that_mixes_the_batch_is_found_out(tmp_path):
    model = ours("gpt2")
    model.blocks[1].mlp = _MixesTheBatch()
    with pytest.raises(SweepError, match="differs by") as caught:
        sweep(model, *pair(2), metric=METRIC, out=tmp_path)
    saved = Scores.load(tmp_path)
    assert saved.certificate["max_difference"] > saved.certificate["tolerance"]
    assert torch.equal(saved.values, caught.value.scores.values)
    assert caught.value.scores.plan["strategy"] == "stacked forwards"
    assert "blocks.1.mlp" in caught.value.scores.plan["because"]


# -- arguments, text, files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"verify": -1}, "verify=-1"),
        ({"sites": "resid_prr"}, "Nearest: 'resid_pre'"),
        ({"by": ("layer", "head")}, "cannot be swept by 'head'"),
        ({"positions": [0, 9]}, "positions 9 is out of range"),
        ({"heads": 1}, "heads= was given"),
        ({"window": 0}, "window=0"),
        ({"mode": "ad"}, "Nearest: 'add'"),
        ({"source": "zeros"}, "Nearest: 'zero'"),
        ({"source": "resample"}, "Give at least two"),
        ({"source": torch.zeros(7)}, r"the source tensor \[7\] does not broadcast"),
        ({"sites": "rot_q"}, "this model has no rot_q"),
        ({"sites": ["z", "z"]}, "names a site twice"),
        ({"sites": ["z", "resid_pre"]}, "are swept by different axes"),
        ({"memory": 1000}, "memory=1,000 bytes is too little.* Give at least"),
        ({"memory": "lots"}, "memory 'lots' is no amount"),
        ({"memory": 0}, "at least one byte"),
        ({"metric": []}, "metric= is empty"),
        ({"metric": lambda logits: logits}, r"returned shape \[1, 5, 50\]"),
        ({"metric": lambda logits: logits[:, -1]}, r"returned shape \[1, 50\]"),
        ({"metric": lambda logits: "high"}, "returned str"),
        ({"metric": [METRIC, lambda logits: None]}, "returned NoneType"),
        ({"metric": logit_diff(7, 50)}, "answer token 50 is not in the vocabulary"),
        ({"metric": logit_diff([7, 8], 3)}, "2 answers for 1 examples"),
        ({"runs": []}, "runs= is empty"),
        ({"runs": [[]]}, "run 0 has no patches"),
        ({"runs": {"mine": Patch("z", 9)}}, "run mine: layer 9 is out of range"),
        ({"runs": [Patch("z", 0)], "layers": 1}, "layers= goes with sites="),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \[1, 4\]"),
    ],
)
def test_bad_arguments_before_any_forward(forwards, arguments, message):
    with pytest.raises(FastlensError, match=message):
        sweep(ours("gpt2"), *pair(), **{"metric": METRIC, **arguments})
    assert forwards == []


def test_a_direction_that_is_none():
    # The type checker of the test run knows the two words as well.
    unchecked = inspect.unwrap(plan)
    with pytest.raises(SweepError, match="Nearest: 'denoising'"):
        unchecked(ours("gpt2"), *pair(), metric=METRIC, direction="denoise")


def test_prompts_that_do_not_fit_before_any_forward(forwards):
    model, (clean, corrupted) = ours("gpt2"), pair()
    for wrong, message in [
        (corrupted[:, :-1], "the clean prompt has 5 tokens and the corrupted one 4"),
        (corrupted.expand(2, -1), "1 clean prompts and 2 corrupted ones"),
        (corrupted + 50, "clean|corrupted holds token"),
        (corrupted[:, :0], "the clean prompt has 5 tokens and the corrupted one 0"),
    ]:
        with pytest.raises(FastlensError, match=message):
            sweep(model, clean, wrong, metric=METRIC)
    assert forwards == []


def test_an_unwritable_folder_is_said_before_any_forward(forwards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot list the folder"):
        sweep(ours("gpt2"), *pair(), metric=METRIC, out=tmp_path / "file" / "results")
    assert forwards == []


def test_text_end_to_end(tmp_path):
    pytest.importorskip("matplotlib")
    model = text_model()
    clean, corrupted = "the cat in a", "the cat on a"
    scores = sweep(
        model, clean, corrupted, metric=logit_diff(" cat", " the", normalize=True), out=tmp_path
    )
    loaded = Scores.load(tmp_path)
    assert torch.equal(loaded.values, scores.values)
    assert loaded.labels["pos"][2] == " cat:2"
    assert any("/" in label for label in loaded.labels["pos"])
    assert (loaded.meta["clean"], loaded.meta["corrupted"]) == (clean, corrupted)
    assert loaded.meta["clean_tokens"] == model.to_tokens(clean).tolist()
    assert loaded.meta["direction"] == "denoising"
    assert loaded.certificate["runs"] == 1
    assert loaded.title == "denoising resid_pre, logit difference (' cat' vs ' the')"
    scores.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").exists()


def test_prompts_of_unequal_length_are_shown():
    with pytest.raises(SweepError, match=r"clean \(\d\): .*\n.*corrupted \(\d\): "):
        sweep(text_model(), "the cat", "the dog", metric=answer_logit(0))


def test_short_work_shows_no_progress_bar(capsys):
    sweep(ours("gpt2"), *pair(), metric=METRIC)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("progress", [True, False])
def test_long_work_shows_one(capsys, monkeypatch, progress):
    import tqdm

    def impatient(*args, delay, **kwargs):
        assert delay == 2
        return tqdm.tqdm(*args, delay=0, **kwargs)

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["fastlens.patching.execute"], "tqdm", impatient)
    sweep(ours("gpt2"), *pair(), metric=METRIC, progress=progress)
    shown = capsys.readouterr().err
    assert ("resid_pre denoising" in shown and "12/12" in shown) == progress
