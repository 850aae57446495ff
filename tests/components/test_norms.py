"""Norms: fused equals hooked, hooks see what TransformerLens' see, 16-bit statistics in float32."""

import pytest
import torch

from fastlens.components.norms import (
    LayerNorm,
    LayerNormPre,
    RMSNorm,
    RMSNormPre,
    final_norm,
    make_norm,
    norm_before,
    norm_behind,
)
from fastlens.config import HookedTransformerConfig
from tests.close import assert_close_to, assert_no_worse
from tests.configs import tiny

NORMS = [LayerNorm, LayerNormPre, RMSNorm, RMSNormPre]


def build(cls, dtype=torch.float32):
    norm = cls(HookedTransformerConfig(**tiny("gpt2", dtype=dtype)))
    with torch.no_grad():
        for leaf in norm.parameters():
            leaf.copy_(torch.randn(leaf.shape))
    return norm


@pytest.mark.parametrize("cls", NORMS)
@pytest.mark.parametrize("shape", [(2, 3, 32), (2, 3, 4, 32)])
def test_fused_equals_hooked(cls, shape):
    norm, x = build(cls), torch.randn(shape) * 5 + 2
    fused, seen = norm(x), {}
    norm.hook_scale.add_hook(lambda a, hook: seen.update(scale=a))
    norm.hook_normalized.add_hook(lambda a, hook: seen.update(normalized=a))
    hooked = norm(x)
    assert_close_to(fused, hooked, atol=5e-6)
    centred = x - x.mean(-1, keepdim=True) if cls in (LayerNorm, LayerNormPre) else x
    assert_close_to(seen["scale"], (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert_close_to(seen["normalized"], centred / seen["scale"])


@pytest.mark.parametrize("cls", NORMS)
def test_editing_scale_takes_effect(cls):
    norm, x = build(cls), torch.randn(1, 2, 32)
    plain = norm(x)
    norm.hook_scale.add_hook(lambda scale, hook: scale * 2)
    offset = norm.b if cls is LayerNorm else 0.0
    assert_close_to(norm(x) - offset, (plain - offset) / 2)


@pytest.mark.parametrize("cls", NORMS)
def test_16_bit_statistics_are_taken_in_float32(cls):
    norm, x = build(cls, torch.bfloat16), (torch.randn(4, 32) * 50).bfloat16()
    exact = build(cls, torch.float64)
    exact.load_state_dict(norm.state_dict())
    truth, fused, seen = exact(x.double()), norm(x), []
    norm.hook_normalized.add_hook(lambda a, hook: seen.append(a.dtype))
    hooked = norm(x)
    assert fused.dtype == hooked.dtype == torch.bfloat16 and seen == [torch.float32]
    assert_no_worse(fused, hooked, truth, floor=1e-2)


def test_make_norm_and_final_norm():
    cfg = HookedTransformerConfig(**tiny("gpt2", normalization_type="LNPre", final_rms=True))
    assert type(final_norm(cfg)) is RMSNormPre
    assert type(make_norm(cfg, "LN")) is LayerNorm
    assert isinstance(make_norm(cfg, None), torch.nn.Identity)
    assert final_norm(HookedTransformerConfig(**tiny("no_norm"))) is None


def test_where_norms_stand():
    before, behind = norm_before, norm_behind
    plain = HookedTransformerConfig(**tiny("llama"))
    assert (before(plain, "ln1"), behind(plain, "ln1")) == ("ln1", None)
    both = HookedTransformerConfig(**tiny("post_norm"))
    assert (before(both, "ln2"), behind(both, "ln2")) == ("ln2", "ln2_post")
    olmo = HookedTransformerConfig(**tiny("olmo2"))
    assert (before(olmo, "ln2"), behind(olmo, "ln2")) == (None, "ln2")
    for where in ({}, {"norm_after_sublayer": True}, {"use_normalization_before_and_after": True}):
        none = HookedTransformerConfig(**tiny("no_norm", **where))
        assert (before(none, "ln1"), behind(none, "ln1")) == (None, None)


@pytest.mark.tl
def test_where_norms_stand_in_transformer_lens_models():
    tl = pytest.importorskip("transformer_lens")
    for name in ("llama", "olmo2", "post_norm"):
        theirs = tl.HookedTransformerConfig(**tiny(name))
        ours = HookedTransformerConfig(**tiny(name))
        for where in (norm_before, norm_behind):
            assert where(theirs, "ln1") == where(ours, "ln1"), name
