"""Direct logit attribution: the shares sum to the logit, and each is its component's own."""

import inspect

import pytest
import torch

from fastlens.analysis.direct_logit_attribution import direct_logit_attribution
from fastlens.errors import ConfigError, FastlensError, MetricError, SweepError
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS
from tests.encoders import ours as encoder
from tests.models import ours, prompts
from tests.patching.against_hooks import mask_of
from tests.patching.texts import text_model

UNITS = ("component", "head", "neuron")


def units_of(model):
    return UNITS[:2] if model.cfg.attn_only or model.cfg.num_experts else UNITS


def logits_before_the_cap(model, tokens, **options):
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="unembed.hook_out", **options)
    return cache["unembed.hook_out"]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_shares_sum_to_the_logit(name, folded):
    model = ours(name, dtype=torch.float64)
    if folded and name != "shortformer":
        model.process_weights_()
    tokens = prompts(3, 9)
    logits = logits_before_the_cap(model, tokens)
    answers, wrong, positions = [1, 2, 3], [4, 5, 6], [2, 5, 8]
    for by in units_of(model):
        last = direct_logit_attribution(model, tokens, 3, by=by)
        assert_close_to(last.per_example.sum(1), logits[:, -1, 3], atol=1e-11, name=by)
        assert last.values.sum().item() == pytest.approx(last.meta["logit"], abs=1e-11)
        each = direct_logit_attribution(model, tokens, answers, wrong, by=by, position=positions)
        rows = logits[range(3), positions]
        truth = rows[range(3), answers] - rows[range(3), wrong]
        assert_close_to(each.per_example.sum(1), truth, atol=1e-11, name=by)
        # Nothing was left over: the last row is the biases', which are known.
        assert last.labels["component"][-1] == "bias"


def test_experts_have_no_neurons_that_all_tokens_pass():
    with pytest.raises(ConfigError, match="mixtures of experts"):
        direct_logit_attribution(ours("moe"), prompts(1, 4), 3, by="neuron")


def test_shares_of_a_folded_model_are_the_caches():
    model = ours("gpt2", dtype=torch.float64)
    model.process_weights_()
    tokens = prompts(2, 9)
    _, cache = model.run_with_cache(tokens)
    stack, labels = cache.decompose_resid(pos_slice=-1, return_labels=True)
    want = cache.logit_attrs(stack, tokens=3, incorrect_tokens=7, pos_slice=-1)
    scores = direct_logit_attribution(model, tokens, 3, 7)
    assert_close_to(scores.per_example[:, :-1], want.T, atol=1e-12)
    named = ["embed", "pos_embed", "L0 attn", "L0 MLP", "L1 attn", "L1 MLP", "L2 attn", "L2 MLP"]
    assert scores.labels["component"] == [*named, "bias"] and len(labels) == 8
    assert_close_to(
        scores.values[-1], (model.b_U[3] - model.b_U[7]).reshape(()), atol=1e-12, name="bias"
    )
    heads = cache.stack_head_results(pos_slice=-1)
    want = cache.logit_attrs(heads, tokens=3, incorrect_tokens=7, pos_slice=-1)
    scores = direct_logit_attribution(model, tokens, 3, 7, by="head", rest=False)
    assert scores.axes == ("layer", "head")
    assert_close_to(scores.per_example.flatten(1), want.T, atol=1e-12)
    neurons = cache.stack_neuron_results(-1, pos_slice=-1)
    want = cache.logit_attrs(neurons, tokens=3, incorrect_tokens=7, pos_slice=-1)
    scores = direct_logit_attribution(model, tokens, 3, 7, by="neuron", rest=False)
    assert scores.axes == ("layer", "neuron") and scores.labels["neuron"][:2] == ["N0", "N1"]
    assert_close_to(scores.per_example.flatten(1), want.T, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "post_norm", "neox"])
def test_each_share_is_what_its_component_adds(name):
    """Take one component out of the final stream, with the norm held: the logit loses its share."""
    model = ours(name, dtype=torch.float64)
    tokens = prompts(2, 9)
    scores = direct_logit_attribution(model, tokens, 3, by="head")
    _, cache = model.run_with_cache(tokens)
    final, scale = cache["resid_post", -1][:, -1], cache["ln_final.hook_scale"][:, -1]

    def logit(stream):
        if name != "post_norm":
            stream = stream - stream.mean(-1, keepdim=True)
            return (stream / scale * model.ln_final.w + model.ln_final.b) @ model.W_U[:, 3]
        return stream / scale * model.ln_final.w @ model.W_U[:, 3]

    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            wrote = cache["z", layer][:, -1, head] @ model.W_O[layer, head]
            if name == "post_norm":
                norm = f"blocks.{layer}.ln1_post.hook_scale"
                wrote = wrote / cache[norm][:, -1] * model.blocks[layer].ln1_post.w
            loss = logit(final) - logit(final - wrote)
            at = scores.labels["component"].index(f"L{layer}H{head}")
            assert_close_to(scores.per_example[:, at], loss, atol=1e-12)


def test_a_model_known_by_hand():
    """No norm, one layer: the shares are dot products that one can write down."""
    model = ours("gpt2", n_layers=1, normalization_type=None, dtype=torch.float64)
    tokens = torch.tensor([[4, 9]])
    scores = direct_logit_attribution(model.requires_grad_(False), tokens, 3)
    values = dict(zip(scores.labels["component"], scores.values.tolist(), strict=True))
    assert values["embed"] == pytest.approx(float(model.W_E[9] @ model.W_U[:, 3]), abs=1e-12)
    assert values["pos_embed"] == pytest.approx(float(model.W_pos[1] @ model.W_U[:, 3]), abs=1e-12)
    assert values["bias"] == pytest.approx(float(model.b_U[3]), abs=1e-12)
    assert scores.unit == "logits"


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_batches_and_padding(name, padding):
    model = ours(name, dtype=torch.float64)
    tokens = prompts(3, 9)
    mask = mask_of(padding, 3, 9)
    ends = [8, 8, 8] if padding == "left" else [int(row.sum()) - 1 for row in mask]
    for by in UNITS:
        whole = direct_logit_attribution(
            *(model, tokens, 3, 7), by=by, position=ends, attention_mask=mask
        )
        for i in range(3):
            alone = direct_logit_attribution(model, tokens[i][mask[i] == 1], 3, 7, by=by)
            assert_close_to(whole.per_example[i], alone.values, atol=1e-12)


def test_padding_is_no_place_to_read():
    model, tokens = ours("gpt2"), prompts(3, 9)
    with pytest.raises(SweepError, match="position 8 of prompt 0 is padding"):
        direct_logit_attribution(model, tokens, 3, attention_mask=mask_of("right", 3, 9))
    with pytest.raises(SweepError, match="position 0 of prompt 1 is padding"):
        direct_logit_attribution(
            *(model, tokens, 3), position=[2, 0, 0], attention_mask=mask_of("left", 3, 9)
        )


def test_texts_of_different_lengths():
    model = text_model()
    texts = ["The cat sat", "The dog sat on the mat"]
    scores = direct_logit_attribution(model, texts, [3, 4])
    assert scores.meta["prompts"] == texts
    for i, text in enumerate(texts):
        alone = direct_logit_attribution(model, text, 3 + i)
        assert_close_to(scores.per_example[i], alone.values, atol=1e-5)
    assert scores.standard_error is not None


def test_a_hook_that_writes_into_the_stream_gets_a_row():
    model = ours("gpt2", dtype=torch.float64)
    tokens = prompts(2, 9)
    steer = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
    plain = direct_logit_attribution(model, tokens, 3)
    model.add_hook("blocks.1.hook_resid_pre", lambda x, hook: x + steer)
    scores = direct_logit_attribution(model, tokens, 3)
    assert scores.labels["component"][-2:] == ["bias", "other"]
    assert_close_to(scores.per_example.sum(1), logits_before_the_cap(model, tokens)[:, -1, 3])
    assert scores.values[-1].abs() > 1e-3
    assert_close_to(scores.values[-2], plain.values[-1], atol=1e-12)
    assert len(model.hook_dict["blocks.1.hook_resid_pre"].fwd_hooks) == 1


@pytest.mark.parametrize("by", UNITS)
def test_replaced_norms_and_hooks_of_torch(by):
    model, tokens = ours("gpt2", dtype=torch.float64), prompts(3, 9)
    model.ln_final = torch.nn.Identity()
    plain = direct_logit_attribution(model, tokens, 3, by=by)
    assert plain.labels["component"][-1] == "bias"
    assert_close_to(plain.per_example.sum(1), model(tokens)[:, -1, 3].detach(), atol=1e-12)
    model.unembed.register_forward_hook(lambda module, args, out: 2 * out)
    doubled = direct_logit_attribution(model, tokens, 3, by=by)
    assert doubled.labels["component"][-1] == "other"
    assert_close_to(doubled.per_example.sum(1), model(tokens)[:, -1, 3].detach(), atol=1e-12)
    model.ln_final = torch.nn.LayerNorm(32, dtype=torch.float64)
    with pytest.raises(ConfigError, match="ln_final is a LayerNorm without hook_scale"):
        direct_logit_attribution(model, tokens, 3, by=by)


def test_soft_capped_logits_are_taken_before_the_cap():
    model = ours("softcap", dtype=torch.float64)
    tokens = prompts(2, 9)
    scores = direct_logit_attribution(model, tokens, 3)
    assert scores.unit == "logits before the soft-cap"
    cap = model.cfg.output_logits_soft_cap
    with torch.no_grad():
        capped = model(tokens)[:, -1, 3]
    assert_close_to(cap * torch.tanh(scores.per_example.sum(1) / cap), capped, atol=1e-11)


def test_half_precision_sums_to_what_the_model_said():
    model = ours("llama").to(torch.bfloat16)
    scores = direct_logit_attribution(model, prompts(2, 9), 3, by="head")
    assert scores.values.dtype == torch.float32
    assert scores.values.sum().item() == pytest.approx(scores.meta["logit"], abs=0.25)


def test_the_rest_and_the_titles():
    model = ours("gpt2")
    tokens = prompts(2, 9)
    every = direct_logit_attribution(model, tokens, 3, 7, by="head")
    heads = direct_logit_attribution(model, tokens, 3, 7, by="head", rest=False)
    assert heads.title == "direct attribution of the logit difference (3 vs 7), by head"
    assert_close_to(heads.values.flatten(), every.values[:12])
    assert heads.meta["rest"] == pytest.approx(float(every.values[12:].sum()), abs=1e-5)
    assert every.labels["component"][11:13] == ["L2H3", "embed"]


def test_nothing_of_the_size_of_all_neurons_times_the_stream(monkeypatch):
    """Projected before it is split up."""
    model = ours("gpt2")
    largest = []
    for name in ("__mul__", "__matmul__"):
        plain = getattr(torch.Tensor, name)

        def watched(a, b, plain=plain):
            result = plain(a, b)
            largest.append(result.numel())
            return result

        monkeypatch.setattr(torch.Tensor, name, watched)
    from fastlens.analysis.direct_logit_attribution import _Run

    run = _Run(model, [8, 8])
    with torch.no_grad():
        model.run_with_hooks(prompts(2, 9), fwd_hooks=run.hooks("neuron"))
        run.rows.pop("unembed.hook_out")
        largest.clear()
        run.shares("neuron", [torch.tensor([3, 3])], [1.0])
    assert largest and max(largest) <= 2 * model.cfg.d_mlp


def test_what_is_refused():
    model, tokens = ours("attn_only"), prompts(2, 9)
    with pytest.raises(ConfigError, match="attn_only"):
        direct_logit_attribution(model, tokens, 3, by="neuron")
    model = ours("gpt2")
    with pytest.raises(FastlensError, match="goes with by='head'"):
        direct_logit_attribution(model, tokens, 3, rest=False)
    with pytest.raises(FastlensError, match="one of component, head, neuron"):
        direct_logit_attribution(model, tokens, 3, by="heads")
    with pytest.raises(MetricError, match="3 answers for 2 examples"):
        direct_logit_attribution(model, tokens, [1, 2, 3])
    with pytest.raises(SweepError, match="a HookedEncoder cannot be swept"):
        inspect.unwrap(direct_logit_attribution)(encoder(), tokens, 3)
