"""Sweeps against one run at a time by `run_with_hooks`, and what surrounds them."""

import itertools
import math
import re
import sys

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import MetricError, SourceError, SweepError
from fastlens.patching import (
    answer_logit,
    answer_prob,
    cross_entropy,
    kl_divergence,
    logit_diff,
    sweep,
)
from fastlens.patching.sites import SITES, available_sites
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


@pytest.mark.parametrize("batch_size", [1, 2, 7, 10_000])
def test_the_batch_size_does_not_change_the_result(batch_size):
    model = ours("neox", dtype=torch.float64)
    clean, corrupted = pair(2)
    default = sweep(model, clean, corrupted, metric=METRIC)
    other = sweep(model, clean, corrupted, metric=METRIC, batch_size=batch_size)
    assert_close_to(other.values, default.values, atol=1e-12)
    assert other.plan["runs_per_forward"] == max(1, batch_size // 2)


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

    sweep(model, *pair(2), metric=metric)
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
    with pytest.raises(SweepError, match="reads position 5, and the prompts have 5 tokens"):
        sweep(ours("gpt2"), *pair(), metric=answer_logit(0, position=5))


def test_half_precision_is_swept_and_checked():
    model = ours("llama", dtype=torch.bfloat16)
    clean, corrupted = pair(2)
    scores = sweep(model, clean, corrupted, metric=METRIC, sites="z", verify="all")
    assert scores.values.dtype == torch.float32
    assert scores.certificate["max_difference"] <= scores.certificate["tolerance"]


# -- the certificate -----------------------------------------------------------------------------


def count_forwards(model):
    calls = []
    hook_free = model.embed.forward
    model.embed.forward = lambda *args, **kwargs: (calls.append(1), hook_free(*args, **kwargs))[1]
    return calls


@pytest.mark.parametrize(
    ("verify", "runs"), [(1, 1), (0, 0), (False, 0), (True, 15), (4, 4), ("all", 15), (99, 15)]
)
def test_how_many_runs_are_verified(verify, runs):
    model = ours("gpt2")
    calls = count_forwards(model)
    scores = sweep(model, *pair(), metric=METRIC, verify=verify)
    assert scores.certificate["runs"] == runs == len(scores.certificate["checked"])
    assert ("max_difference" in scores.certificate) == (runs > 0)
    # Clean, corrupted, the residual streams, and one whole forward for each check.
    assert len(calls) == 3 + runs
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
    advice = int(re.search(r"batch_size=(\d+)", str(caught.value)).group(1))
    scores = sweep(model, *pair(2), metric=METRIC, batch_size=advice, verify="all")
    assert scores.certificate["max_difference"] <= scores.certificate["tolerance"]


# -- arguments, text, files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "denoise"}, "Nearest: 'denoising'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"verify": -1}, "verify=-1"),
        ({"sites": "resid_prr"}, "Nearest: 'resid_pre'"),
        ({"by": ("layer", "head")}, "cannot be swept by 'head'"),
        ({"positions": [0, 9]}, "positions 9 is out of range"),
        ({"heads": 1}, "heads= was given"),
    ],
)
def test_bad_arguments_before_any_forward(arguments, message):
    model = ours("gpt2")
    calls = count_forwards(model)
    if "direction" in arguments:
        # The type checker of the test run knows the two words as well.
        from fastlens.patching.sweep import _check_options

        with pytest.raises(SweepError, match=message):
            _check_options(arguments["direction"], None, 1)
        return
    with pytest.raises(SweepError, match=message):
        sweep(model, *pair(), metric=METRIC, **arguments)
    assert calls == []


def test_an_unwritable_folder_is_said_before_any_forward(tmp_path):
    (tmp_path / "file").write_text("")
    model = ours("gpt2")
    calls = count_forwards(model)
    with pytest.raises(SourceError, match="cannot write into the folder"):
        sweep(model, *pair(), metric=METRIC, out=tmp_path / "file" / "results")
    assert calls == []


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
    monkeypatch.setattr(sys.modules["fastlens.patching.sweep"], "tqdm", impatient)
    sweep(ours("gpt2"), *pair(), metric=METRIC, progress=progress)
    shown = capsys.readouterr().err
    assert ("resid_pre denoising" in shown and "15/15" in shown) == progress
