"""Path patching against its three forwards, written out, and what is refused."""

import inspect
import re
from dataclasses import replace

import pytest
import torch

from fastlens.analysis import path_patching as module
from fastlens.analysis.path_patching import path_patching
from fastlens.errors import SweepError
from fastlens.patching import logit_diff, sweep
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS
from tests.encoders import ours as encoder
from tests.models import ours, theirs
from tests.patching.against_hooks import mask_of, pairs
from tests.patching.texts import text_model

METRIC = logit_diff(3, 7)
EDGE = [(1, 1, "q")]


def _keep(kept):
    def hook(activation, hook):
        kept[hook.name] = activation.clone()

    return hook


def by_three_forwards(
    model,
    clean,
    corrupted,
    receivers="logits",
    mlps="recompute",
    direction="noising",
    mask=None,
    heads=None,
):
    """Values [batch, layer, head], as the docstring of path_patching says, one sender at a time;
    NaN for heads that are left out."""
    base, source = (clean, corrupted) if direction == "noising" else (corrupted, clean)
    masked = {} if mask is None else {"attention_mask": mask}
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    listed = [] if receivers == "logits" else receivers
    places = [(f"blocks.{layer}.attn.hook_{letter}", head) for layer, head, letter in listed]
    values = torch.full((len(base), n_layers, n_heads), torch.nan, dtype=torch.float64)
    with torch.no_grad():
        _, at_base = model.run_with_cache(base, **masked)
        _, at_source = model.run_with_cache(source, **masked)
        for layer in range(n_layers):
            for head in heads or range(n_heads):

                def freeze(activation, hook, layer=layer, head=head):
                    value = at_base[hook.name].clone()
                    if hook.name == f"blocks.{layer}.attn.hook_z":
                        value[:, :, head] = at_source[hook.name][:, :, head]
                    return value

                frozen = [f"blocks.{n}.attn.hook_z" for n in range(n_layers)]
                if mlps == "freeze" and not model.cfg.attn_only:
                    frozen += [f"blocks.{n}.hook_mlp_out" for n in range(n_layers)]
                heard = {}
                hooks = [(name, freeze) for name in frozen]
                hooks += [(name, _keep(heard)) for name, _ in places]
                logits = model.run_with_hooks(base, fwd_hooks=hooks, **masked)
                if places:

                    def put(activation, hook, heard=heard):
                        activation = activation.clone()
                        for name, own in places:
                            if name == hook.name:
                                activation[:, :, own] = heard[name][:, :, own]
                        return activation

                    names = dict.fromkeys(name for name, _ in places)
                    hooks = [(name, put) for name in names]
                    logits = model.run_with_hooks(base, fwd_hooks=hooks, **masked)
                values[:, layer, head] = METRIC(logits).double()
    return values


def receivers_of(model):
    """The logits, and inputs of each kind in the first and last layer that may hear."""
    last = model.cfg.n_layers - 1
    return ["logits", [(1, 0, "k"), (last, 0, "v"), (last, 2, "q")]]


@pytest.mark.parametrize("mlps", ["recompute", "freeze"])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_exact_in_every_family(name, mlps):
    model = ours(name, dtype=torch.float64)
    clean, corrupted = pairs(3, 9)
    for receivers in receivers_of(model):
        scores = path_patching(
            *(model, clean, corrupted), receivers=receivers, metric=METRIC, mlps=mlps
        )
        truth = by_three_forwards(model, clean, corrupted, receivers, mlps, heads=(0, 3))
        found = scores.per_example[..., [0, 3]]
        assert_close_to(found, truth[..., [0, 3]], atol=1e-10, name=f"{name} {receivers}")
        assert_close_to(scores.values, scores.per_example.mean(0), atol=1e-12)
        # The heads that are heard do something, so that the comparison says something.
        assert (scores.values[0] - scores.reference).abs().max() > 1e-6
        assert scores.meta["checked_message"]["max_difference"] <= 1e-11


def test_latents():
    """A norm stands between the stream and what receivers read."""
    latent = {"n_key_value_heads": None, "d_head": 10, "rotary_dim": 4, "d_kv_latent": 7,
              "d_q_latent": 9, "d_value": 6}  # fmt: skip
    model = ours("llama", dtype=torch.float64, **latent)
    clean, corrupted = pairs(2, 8)
    for receivers in receivers_of(model):
        scores = path_patching(model, clean, corrupted, receivers=receivers, metric=METRIC)
        truth = by_three_forwards(model, clean, corrupted, receivers, heads=(0, 3))
        found = scores.per_example[..., [0, 3]]
        assert_close_to(found, truth[..., [0, 3]], atol=1e-10, name=str(receivers))
        assert scores.meta["checked_message"]["max_difference"] <= 1e-11


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_float32(direction):
    model = ours("gpt2")
    clean, corrupted = pairs(2, 8)
    for receivers in receivers_of(model):
        scores = path_patching(
            *(model, clean, corrupted), receivers=receivers, metric=METRIC, direction=direction
        )
        truth = by_three_forwards(model, clean, corrupted, receivers, direction=direction)
        assert_close_to(scores.per_example, truth.float(), atol=1e-5)


def test_a_model_known_by_hand():
    """Attention-only, no norms: to the logits a head's path is its own share of them."""
    model = ours("attn_only", normalization_type=None, dtype=torch.float64)
    clean, corrupted = pairs(1, 6)
    scores = path_patching(model, clean, corrupted, metric=METRIC)
    _, at_clean = model.run_with_cache(clean)
    _, at_corrupted = model.run_with_cache(corrupted)
    direction = model.W_U[:, 3] - model.W_U[:, 7]
    for layer in range(2):
        name = f"blocks.{layer}.attn.hook_z"
        change = (at_corrupted[name] - at_clean[name])[0, -1]  # [head, d_head]
        written = torch.einsum("hd,hdm->hm", change, model.W_O[layer])
        assert_close_to(scores.values[layer] - scores.reference, written @ direction, atol=1e-12)


def test_freezing_mlps_changes_what_passes_them_and_nothing_else():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pairs(2, 8)
    through = path_patching(model, clean, corrupted, metric=METRIC).values
    around = path_patching(model, clean, corrupted, metric=METRIC, mlps="freeze").values
    assert (through - around).abs().min() > 1e-9
    # No MLP lies between attention and MLP of one layer in parallel blocks.
    model = ours("neox", dtype=torch.float64)
    through = path_patching(model, clean, corrupted, metric=METRIC).values
    around = path_patching(model, clean, corrupted, metric=METRIC, mlps="freeze").values
    assert_close_to(through[-1], around[-1], atol=1e-12)
    assert (through[0] - around[0]).abs().min() > 1e-9


def test_heads_that_come_too_late_have_the_base_value():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pairs(2, 8)
    scores = path_patching(model, clean, corrupted, receivers=EDGE, metric=METRIC)
    with torch.no_grad():
        base = METRIC(model(clean))
    assert scores.reference == pytest.approx(float(base.mean()), abs=1e-12)
    late = scores.per_example[:, 1:]
    assert_close_to(late, base[:, None, None].expand(late.shape), atol=1e-12)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bidirectional"])
def test_padding(name, padding, monkeypatch):
    model = ours(name, dtype=torch.float64)
    clean, corrupted = pairs(3, 9)
    mask = mask_of(padding, 3, 9)
    if padding == "right":
        with pytest.raises(SweepError, match="position 8 of prompt 0 is padding"):
            path_patching(model, clean, corrupted, metric=METRIC, attention_mask=mask)
    # The last token that is no padding.
    last = [-1] * 3 if padding == "left" else [-3, -2, -1]
    monkeypatch.setitem(globals(), "METRIC", replace(METRIC, position=last))
    for receivers in ("logits", EDGE):
        scores = path_patching(
            *(model, clean, corrupted), receivers=receivers, metric=METRIC, attention_mask=mask
        )
        truth = by_three_forwards(model, clean, corrupted, receivers, mask=mask)
        assert_close_to(scores.per_example, truth, atol=1e-10)


def test_batches_and_memory_change_nothing():
    model = ours("llama", dtype=torch.float64)
    clean, corrupted = pairs(3, 9)
    several = [(1, 0, "k"), (2, 2, "q")]
    whole = path_patching(model, clean, corrupted, receivers=several, metric=METRIC)
    for i in range(3):
        one = path_patching(model, clean[i], corrupted[i], receivers=several, metric=METRIC)
        assert_close_to(one.values, whole.per_example[i], atol=1e-12)
    paths = module._Paths(
        model,
        module.prompts_of(model, clean, corrupted),
        "noising",
        module._receivers(model, several),
        True,
        positions=[2, 3, 4, 5, 6, 7, 8],
        n_bytes=1,
    )
    with torch.no_grad():
        singly = paths.all_by_rows()
        paths.n_bytes = 2**30
        together = paths.all_by_rows()
    assert list(singly) == list(together) == [(n, h) for n in range(2) for h in range(4)]
    for sender, message in together.items():
        for a, b in zip(singly[sender], message, strict=True):
            assert_close_to(a, b, atol=1e-13)


def test_text_several_metrics_and_fractions_of_the_gap():
    model = text_model()
    texts = "the cat in a", "the cat on a"
    metrics = {"difference": logit_diff(3, 7, normalize=True), "last": lambda x: x[:, -1, 5]}
    scores = path_patching(model, *texts, metric=metrics)
    assert scores.axes == ("metric", "layer", "head")
    assert scores.labels["layer"] == ["L0", "L1", "L2"]
    tokens = [model.to_tokens(text) for text in texts]
    truth = by_three_forwards(model, *tokens)[0]
    with torch.no_grad():
        clean, corrupted = (METRIC(model(one)) for one in tokens)
    fraction = (truth - corrupted) / (clean - corrupted)
    found = scores.select(metric="difference")
    assert_close_to(found.values, fraction.float(), atol=1e-4)
    assert found.reference == 1.0
    assert found.title.endswith("noising paths from heads to logits, difference")
    assert scores.meta["clean"] == texts[0]
    assert (scores.meta["receivers"], scores.meta["mlps"]) == (["logits"], "recompute")


def test_metrics_that_look_anywhere():
    """A function is not known by what it read once: it may look elsewhere on other logits."""
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pairs(2, 8)

    def elsewhere(logits):
        where = logits[:, -1, 0].gt(logits[:, 0, 0]).long() + 3
        return logits[torch.arange(len(logits)), where, 5]

    scores = path_patching(model, clean, corrupted, metric=elsewhere)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "METRIC", elsewhere)
        truth = by_three_forwards(model, clean, corrupted)
    assert_close_to(scores.per_example, truth, atol=1e-10)


def test_hooks_and_foreign_modules_take_the_plain_way():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pairs(2, 7)
    model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: x * 0.5 + 0.1)
    for receivers, mlps in (("logits", "recompute"), ([(1, 0, "k"), (2, 2, "q")], "freeze")):
        scores = path_patching(
            *(model, clean, corrupted), receivers=receivers, metric=METRIC, mlps=mlps
        )
        truth = by_three_forwards(model, clean, corrupted, receivers, mlps)
        assert_close_to(scores.per_example, truth, atol=1e-10)
    assert scores.plan["strategy"] == "one forward per run"
    assert len(model.hook_dict["blocks.1.hook_mlp_out"].fwd_hooks) == 1
    model.reset_hooks()

    class Doubled(type(model.blocks[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model.blocks[1].mlp.__class__ = Doubled
    scores = path_patching(model, clean, corrupted, receivers=EDGE, metric=METRIC)
    truth = by_three_forwards(model, clean, corrupted, EDGE)
    assert_close_to(scores.per_example, truth, atol=1e-10)


@pytest.mark.parametrize("place", ["blocks.0.hook_mlp_out", "ln_final.hook_normalized"])
def test_a_hook_may_carry_a_message_back(place):
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pairs(3, 7)
    model.add_hook(place, lambda x, hook: x + 0.3 * x.flip(1))
    for receivers in receivers_of(model):
        scores = path_patching(model, clean, corrupted, receivers=receivers, metric=METRIC)
        truth = by_three_forwards(model, clean, corrupted, receivers)
        assert_close_to(scores.per_example, truth, atol=1e-11)


@pytest.mark.tl
def test_a_model_of_transformer_lens():
    pytest.importorskip("transformer_lens")
    a, b = theirs("gpt2", n_layers=2), ours("gpt2", n_layers=2)
    b.load_state_dict(a.state_dict())
    clean, corrupted = pairs(1, 5)
    found = [
        path_patching(model, clean, corrupted, receivers=EDGE, metric=METRIC) for model in (a, b)
    ]
    assert_close_to(found[0].values, found[1].values, atol=1e-5)


def test_what_a_head_writes_patched_everywhere_is_a_sweep_of_z():
    """From the last layer no other head is in between, so the path is all there is."""
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pairs(2, 8)
    paths = path_patching(model, clean, corrupted, metric=METRIC)
    whole = sweep(model, clean, corrupted, sites="z", metric=METRIC, direction="noising")
    assert_close_to(paths.values[-1], whole.values[-1], atol=1e-11)
    assert (paths.values[0] - whole.values[0]).abs().max() > 1e-6


def test_a_wrong_message_is_found(monkeypatch):
    model = ours("gpt2")
    clean, corrupted = pairs(2, 8)
    sent = module._Paths._sent
    monkeypatch.setattr(module._Paths, "_sent", lambda *args: sent(*args) * 1.01)
    with pytest.raises(SweepError, match="from a forward with hooks") as caught:
        path_patching(model, clean, corrupted, receivers=EDGE, metric=METRIC)
    assert caught.value.scores.axes == ("layer", "head")
    path_patching(model, clean, corrupted, receivers=EDGE, metric=METRIC, verify=False)


def test_receivers_of_grouped_heads_are_kv_heads():
    model = ours("llama")
    clean, corrupted = pairs(1, 7)
    with pytest.raises(SweepError, match="k has 2 heads, not 2"):
        path_patching(model, clean, corrupted, receivers=[(1, 2, "k")], metric=METRIC)
    last = path_patching(model, clean, corrupted, receivers=(-1, -1, "q"), metric=METRIC)
    assert last.meta["receivers"] == ["L2H3.q"]
    one = torch.tensor(1)
    found = path_patching(model, clean, corrupted, receivers=(one, one, "q"), metric=METRIC)
    assert found.meta["receivers"] == ["L1H1.q"]


@pytest.mark.parametrize(
    ("receivers", "message"),
    [
        ("logit", "must be 'logits'"),
        ([], "is empty or names an input twice"),
        ([(1, 1, "q"), (1, 1, "q")], "is empty or names an input twice"),
        ([(1, 1, "z")], "must be (layer, head, 'q')"),
        ([(1, 1)], "must be (layer, head, 'q')"),
        ([("L1", "H1", "q")], "with two integers"),
        ([(1.0, 1, "q")], "with two integers"),
        ([(3, 1, "q")], "q has 3 layers, not 3"),
        ([(1, 4, "q")], "q has 4 heads, not 4"),
        ([(0, 1, "q"), (0, 2, "v")], "no head is before it"),
    ],
)
def test_receivers_that_are_none(receivers, message):
    clean, corrupted = pairs(1, 7)
    with pytest.raises(SweepError, match=re.escape(message)):
        path_patching(ours("gpt2"), clean, corrupted, receivers=receivers, metric=METRIC)


def test_mlps_that_are_none():
    clean, corrupted = pairs(1, 7)
    with pytest.raises(SweepError, match="'recompute' or 'freeze'"):
        path_patching(ours("gpt2"), clean, corrupted, metric=METRIC, mlps="frozen")


def test_a_model_without_one_stack_of_blocks():
    clean, corrupted = pairs(1, 7)
    with pytest.raises(SweepError, match="a HookedEncoder cannot be swept"):
        inspect.unwrap(path_patching)(encoder(), clean, corrupted, metric=METRIC)
