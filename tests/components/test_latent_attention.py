"""Latent attention against its definition, written out."""

import copy
import math

import pytest
import torch

from fastlens import HookedTransformer, HookedTransformerConfig
from fastlens.components.block import attention_class
from fastlens.components.kv_cache import TransformerLensKeyValueCacheEntry
from fastlens.components.latent_attention import LatentAttention
from fastlens.components.rows import projected_heads, projections
from fastlens.errors import ConfigError
from tests.close import assert_close_to

FIELDS = {
    "n_layers": 2, "d_model": 20, "d_head": 10, "n_heads": 3, "n_ctx": 32, "d_vocab": 40,
    "d_mlp": 24, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS",
    "final_rms": True, "positional_embedding_type": "rotary", "rotary_dim": 4,
    "rotary_adjacent_pairs": True, "d_kv_latent": 7, "d_q_latent": 9, "d_value": 6,
    "device": "cpu", "dtype": torch.float64, "seed": 0,
}  # fmt: skip


def config(**changes):
    return HookedTransformerConfig(**{**FIELDS, **changes})


def attention(**changes):
    attn = LatentAttention(config(**changes), "global", 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return attn


def stream(pos=5):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, pos, 20, generator=generator, dtype=torch.float64)


def normed(x, w):
    return x / (x.pow(2).mean() + 1e-6).sqrt() * w


def turned(x, pos):
    """Pairs of the first four channels, turned by hand."""
    out = x.clone()
    for pair in range(2):
        angle = pos * 10000 ** (-2 * pair / 4)
        a, b = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("d_q_latent", [9, None])
def test_it_is_its_definition(d_q_latent):
    attn, x = attention(d_q_latent=d_q_latent), stream()
    got = attn(x, x, x)
    for b in range(2):
        rows = []
        for i in range(5):
            out = attn.b_O.detach().clone()
            for h in range(3):
                seen = x[b, i]
                weight = attn.W_Q[h] if d_q_latent is None else attn.W_QB[h]
                if d_q_latent is not None:
                    seen = normed(seen @ attn.W_QA + attn.b_QA, attn.q_a_norm.w)
                q = turned(seen @ weight, i)
                scores, values = [], []
                for j in range(i + 1):
                    latent = normed(x[b, j] @ attn.W_KVA + attn.b_KVA, attn.kv_a_norm.w)
                    shared = x[b, j] @ attn.W_KR + attn.b_KR
                    k = turned(torch.cat([shared, latent @ attn.W_KB[h]]), j)
                    scores.append(q @ k / math.sqrt(10))
                    values.append(latent @ attn.W_VB[h])
                pattern = torch.stack(scores).softmax(0)
                out = out + (pattern @ torch.stack(values)) @ attn.W_O[h]
            rows.append(out)
        assert_close_to(got[b], torch.stack(rows), atol=1e-12)


def test_inputs_of_single_heads_and_looked_at_scores_change_nothing():
    attn, x = attention(), stream()
    want = attn(x, x, x)
    by_head = x[:, :, None].expand(-1, -1, 3, -1)
    assert_close_to(attn(by_head, by_head.clone(), by_head.clone()), want, atol=1e-12)
    seen = {}
    for name in ("hook_pattern", "hook_z", "hook_q_latent", "hook_kv_latent", "hook_v"):
        getattr(attn, name).add_hook(lambda act, hook, name=name: seen.update({name: act.shape}))
    assert_close_to(attn(x, x, x), want, atol=1e-12)
    assert seen["hook_z"] == seen["hook_v"] == (2, 5, 3, 6)
    assert (seen["hook_q_latent"], seen["hook_kv_latent"]) == ((2, 5, 9), (2, 5, 7))


def test_a_continuation_reads_the_cache():
    attn, x = attention(), stream()
    entry = TransformerLensKeyValueCacheEntry.init_cache_entry(attn.cfg, "cpu", 2)
    first = attn(x[:, :3], x[:, :3], x[:, :3], past_kv_cache_entry=entry)
    rest = attn(x[:, 3:], x[:, 3:], x[:, 3:], past_kv_cache_entry=entry)
    assert entry.past_keys.shape == (2, 5, 3, 10) and entry.past_values.shape == (2, 5, 3, 6)
    assert_close_to(torch.cat([first, rest], 1), attn(x, x, x), atol=1e-12)


def test_rows_are_what_the_hooks_see():
    attn, x = attention(), stream()
    seen = {}
    for name in "qkv":
        point = getattr(attn, f"hook_{name}")
        point.add_hook(lambda act, hook, name=name: seen.update({name: act.flatten(0, 1)}))
    attn(x, x, x)
    rows, heads = x.flatten(0, 1), torch.arange(10) % 3
    for name, found in zip("qkv", projections(attn, rows, "qkv"), strict=True):
        assert_close_to(found, seen[name], atol=1e-12, name=name)
        one_by_one = projected_heads(attn, rows, name, heads)
        assert_close_to(one_by_one, seen[name][torch.arange(10), heads], atol=1e-12)


def test_gradients_reach_every_weight():
    attn, x = attention(), stream()
    attn(x, x, x).pow(2).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in attn.parameters())


def test_other_precisions_have_their_own_tables():
    attn = attention()
    single = copy.deepcopy(attn).float()
    assert single.rotary_cos.dtype == torch.float32
    assert torch.equal(single.double().rotary_cos, attn.rotary_cos)


def test_there_are_no_matrices_past_the_latents():
    model = HookedTransformer(config())
    with pytest.raises(ConfigError, match=r"W_K: this model's .* come through latents"):
        _ = model.W_K
    with pytest.raises(AttributeError, match="QK: .*LatentAttention"):
        _ = model.blocks[0].attn.QK
    with pytest.raises(ConfigError, match="weights from the residual stream to keys"):
        model.blocks[0].attn.key_value_leaves()
    with pytest.raises(AttributeError, match="no attribute 'W_X'"):
        _ = model.blocks[0].attn.W_X
    assert model.W_O.shape == (2, 3, 6, 20)


@pytest.mark.parametrize("d_q_latent", [9, None])
def test_the_config_counts_its_matrices(d_q_latent):
    cfg = config(d_q_latent=d_q_latent)
    assert attention_class(cfg) is LatentAttention
    block = HookedTransformer(cfg).blocks[0]
    matrices = [p for p in (*block.attn.parameters(), *block.mlp.parameters()) if p.ndim > 1]
    matrices = [p for p in matrices if p.shape != block.mlp.b_in.shape]
    assert cfg.n_params == 2 * sum(p.numel() for p in matrices)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_key_value_heads": 1},
        {"positional_embedding_type": "standard"},
        {"use_qk_norm": True},
        {"clip_qkv": 3.0},
        {"use_attention_sinks": True},
        {"rotary_dim": 10},
        {"d_value": 12},
    ],
)
def test_what_no_such_model_has_is_refused(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        LatentAttention(config(**changes))
