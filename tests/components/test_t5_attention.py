"""T5's attention: buckets, biases, and the fused step against the materialised one."""

import pytest
import torch

from fastlens.components.t5_attention import T5Attention
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from tests.close import assert_close_to
from tests.t5 import CONFIG, randomise

COMPARED = [
    "transformer_lens.components.t5_attention.T5Attention.forward",
    "transformer_lens.components.t5_attention.T5Attention.compute_relative_attention_bias",
]


def build(bias=True, is_decoder=False, **changes):
    cfg = HookedTransformerConfig(**{**CONFIG, **changes})
    attn = T5Attention(cfg, has_relative_attention_bias=bias, is_decoder=is_decoder)
    randomise(attn)
    return attn


def inputs(pos=7, kv_pos=9):
    return torch.randn(2, pos, 16), torch.randn(2, kv_pos, 16)


def padding(kv_pos=9, dtype=torch.float32):
    mask = torch.zeros(2, 1, 1, kv_pos, dtype=dtype)
    mask[0, ..., 6:] = torch.finfo(dtype).min
    return mask


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (16, 64)])
def test_buckets_are_transformers(bidirectional, buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention as Theirs

    relative = torch.arange(-300, 301)[None]
    found = T5Attention._relative_position_bucket(relative, bidirectional, buckets, distance)
    theirs = Theirs._relative_position_bucket(relative, bidirectional, buckets, distance)
    assert torch.equal(found, theirs)
    assert found.max() == buckets - 1


@pytest.mark.parametrize("is_decoder", [False, True])
def test_the_bias_of_later_queries_is_part_of_the_whole(is_decoder):
    attn = build(is_decoder=is_decoder)
    whole = attn.compute_relative_attention_bias(12, 12)
    assert whole.shape == (1, 4, 12, 12)
    part = attn.compute_relative_attention_bias(3, 12, offset=9)
    assert torch.equal(part, whole[:, :, 9:])


def test_the_bias_has_a_hook():
    attn = build()
    attn.rel_pos_hook.add_hook(lambda bias, hook: bias * 0)
    assert not attn.compute_relative_attention_bias(4, 4).any()


@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_fused_is_materialised(kind, dtype, grad):
    attn = build(bias=kind != "cross", is_decoder=kind == "decoder").to(dtype)
    attn.cfg.dtype = dtype
    x, other = (t.to(dtype).requires_grad_(grad) for t in inputs())
    other = other if kind == "cross" else x
    options = {}
    if kind != "cross":
        options["position_bias"] = attn.compute_relative_attention_bias(7, 7)
    if kind != "decoder":
        options["additive_attention_mask"] = padding(other.shape[1], dtype)
    results, gradients = [], []
    leaves = [x, *attn.parameters()] if grad else []
    for looks in (False, True):
        if looks:
            attn.hook_pattern.add_hook(lambda pattern, hook: None)
        with torch.set_grad_enabled(grad):
            results.append(attn(x, other, other, **options))
        if grad:
            found = torch.autograd.grad(
                results[-1].square().sum(), leaves, retain_graph=True, allow_unused=True
            )
            gradients.append([g for g in found if g is not None])
    assert_close_to(results[0], results[1])
    for fused, materialised in zip(*gradients, strict=True) if grad else ():
        assert_close_to(fused, materialised, atol=1e-4 if dtype == torch.float32 else 1e-9)


def test_a_decoder_sees_nothing_later():
    attn, (x, _) = build(is_decoder=True), inputs()
    bias = attn.compute_relative_attention_bias(7, 7)
    later = x.clone()
    later[:, 4:] += 1.0
    with torch.no_grad():
        before, after = (attn(y, y, y, position_bias=bias) for y in (x, later))
    assert_close_to(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-3


def test_the_direction_is_the_stacks():
    assert not build().rule.causal
    assert build(is_decoder=True).rule.causal
    # TransformerLens' default direction, for whoever leaves it out.
    assert build(attention_dir="causal").rule.causal


def test_a_soft_cap_or_a_mask_takes_the_materialised_way():
    for attn, options in (
        (build(attn_scores_soft_cap=2.0), {}),
        (build(), {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}),
    ):
        x = torch.randn(2, 3, 16)
        bias = attn.compute_relative_attention_bias(3, 3)
        plain = attn(x, x, x, position_bias=bias, **options)
        attn.hook_pattern.add_hook(lambda pattern, hook: None)
        assert_close_to(plain, attn(x, x, x, position_bias=bias, **options))


def test_a_bias_needs_buckets():
    with pytest.raises(ConfigError, match="relative_attention_num_buckets"):
        build(relative_attention_num_buckets=None)
    attn = T5Attention({**CONFIG, "dtype": torch.float64}, has_relative_attention_bias=True)
    assert attn.rel_pos_bias.weight.dtype == torch.float64
    assert not hasattr(build(bias=False), "rel_pos_bias")


@pytest.mark.tl
@pytest.mark.parametrize("is_decoder", [False, True])
def test_numbers_are_transformer_lens(is_decoder):
    tl = pytest.importorskip("transformer_lens")
    attn = build(is_decoder=is_decoder)
    theirs = tl.components.T5Attention(
        tl.HookedTransformerConfig(**CONFIG),
        has_relative_attention_bias=True,
        is_decoder=is_decoder,
    )
    assert list(theirs.state_dict()) == list(attn.state_dict())
    theirs.load_state_dict(attn.state_dict())
    x, _ = inputs(pos=30)
    bias = attn.compute_relative_attention_bias(30, 30)
    assert torch.equal(bias, theirs.compute_relative_attention_bias(30, 30))
    assert_close_to(attn(x, x, x, position_bias=bias), theirs(x, x, x, position_bias=bias))
