"""QK-norms against what they are defined as, hooked and fused, over batches and packed rows."""

import pytest
import torch
import torch.nn.functional as F

from fastlens.components.qk_norm import (
    HeadLayerNorm,
    HeadRMSNorm,
    JoinedRMSNorm,
    SharedLayerNorm,
    make_qk_norm,
)
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.patching import answer_logit, sweep
from tests.close import assert_close_to
from tests.configs import tiny
from tests.models import ours, prompts

KINDS = {
    "head": HeadRMSNorm,
    "joined": JoinedRMSNorm,
    "layer_norm": HeadLayerNorm,
    "shared_layer_norm": SharedLayerNorm,
    "behind_rotary": HeadRMSNorm,
}
AXES = {
    "head": (24, 1),
    "joined": (2, 3, 1),
    "layer_norm": (2, 3, 4, 1),
    "shared_layer_norm": (2, 3, 4, 1),
    "behind_rotary": (24, 1),
}


def made(kind, n_heads=4):
    cfg = HookedTransformerConfig(
        **tiny("llama", use_qk_norm=True, qk_norm_kind=kind, dtype=torch.float64)
    )
    norm = make_qk_norm(cfg, n_heads)
    with torch.no_grad():
        norm.w.normal_(1.0, 0.3)
        if kind == "shared_layer_norm":
            norm.b.normal_(0.0, 0.3)
    return norm


def defined(kind, norm, x):
    if kind in ("head", "behind_rotary"):
        return F.rms_norm(x, (8,), norm.w, norm.eps)
    if kind == "joined":
        return F.rms_norm(x.flatten(2), (32,), norm.w, norm.eps).view(x.shape)
    if kind == "shared_layer_norm":
        return F.layer_norm(x, (8,), norm.w, norm.b, norm.eps)
    return F.layer_norm(x, (8,), eps=norm.eps) * norm.w


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_computes(kind):
    norm, x = made(kind), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    assert type(norm) is KINDS[kind]
    truth = defined(kind, norm, x)
    assert_close_to(norm.of_heads(x), truth, atol=1e-12)
    assert_close_to(norm.of_rows(x.flatten(0, 1)), truth.flatten(0, 1), atol=1e-12)
    shapes = []
    norm.hook_scale.add_hook(lambda scale, hook: shapes.append(tuple(scale.shape)))
    assert_close_to(norm.of_heads(x), truth, atol=1e-12)
    assert shapes == [AXES[kind]]


def test_behind_the_rotation():
    """Gains differ between channels, so that they do not commute with it."""
    cfg = tiny("llama", use_qk_norm=True, qk_norm_kind="behind_rotary", dtype=torch.float64)
    model = ours("llama", use_qk_norm=True, qk_norm_kind="behind_rotary", dtype=torch.float64)
    attn = model.blocks[0].attn
    with torch.no_grad():
        attn.q_norm.w.uniform_(0.5, 2.0)
        _, cache = model.run_with_cache(prompts())
        turned = attn.apply_rotary(cache["q", 0])
    want = F.rms_norm(turned, (cfg["d_head"],), attn.q_norm.w, attn.q_norm.eps)
    assert_close_to(cache["rot_q", 0], want, atol=1e-12)
    before = attn.apply_rotary(F.rms_norm(cache["q", 0], (cfg["d_head"],), attn.q_norm.w))
    assert (before - want).abs().max() > 1e-2
    with pytest.raises(ConfigError, match="needs 'rotary'"):
        HookedTransformerConfig(**tiny("gpt2", qk_norm_kind="behind_rotary"))


def test_none_is_made_unless_asked():
    assert make_qk_norm(HookedTransformerConfig(**tiny("llama")), 4) is None


@pytest.mark.parametrize("kind", ["joined", "layer_norm"])
def test_copies_of_keys_for_every_query_head(kind):
    """Ungrouped keys that nobody edits give what grouped ones give, hooked and in the wave."""
    model = ours("llama", use_qk_norm=True, qk_norm_kind=kind, dtype=torch.float64)
    with torch.no_grad():
        truth = model(prompts())
        model.set_ungroup_grouped_query_attention(True)
        assert_close_to(model(prompts()), truth, atol=1e-12)
        seen = model.run_with_hooks(
            prompts(), fwd_hooks=[(lambda name: True, lambda x, hook: None)]
        )
    assert_close_to(seen, truth, atol=1e-12)
    found = sweep(
        model, prompts(1), prompts(1, seed=1), sites="k", by=("layer", "head"),
        metric=answer_logit(3), verify="all", progress=False,
    )  # fmt: skip
    assert found.certificate["runs"] > 0 and found.values.shape == (3, 4)


@pytest.mark.parametrize("kind", ["layer_norm", "shared_layer_norm"])
def test_hooks_name_the_axis_of_heads(kind):
    """Or captures of some heads would keep all of them."""
    assert made(kind, 4).hook_scale.axes == "batch pos head one"
    assert made(kind, 2).hook_normalized.axes == "batch pos kv_head d_head"
