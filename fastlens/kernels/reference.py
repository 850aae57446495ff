"""The specification: every op in plain PyTorch, as its formula reads.

The ops on tables of sites and on packed weights stand in `reference_sites`, `reference_packed`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.kernels.masks import AttentionRule, alibi_slopes, visibility
from fastlens.kernels.reference_packed import dequantize as dequantize
from fastlens.kernels.reference_sites import capture as capture
from fastlens.kernels.reference_sites import capture_int8 as capture_int8
from fastlens.kernels.reference_sites import patch_sites as patch_sites


def layer_norm(
    x: Float[Tensor, "... d"],
    w: Float[Tensor, " d"] | None,
    b: Float[Tensor, " d"] | None,
    eps: float,
) -> Float[Tensor, "... d"]:
    """``(x - mean) / sqrt(var + eps) * w + b`` over the last axis, biased variance."""
    centred = x - x.mean(-1, keepdim=True)
    normalized = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return _affine(normalized, w, b)


def rms_norm(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "... d"]:
    """``x / sqrt(mean(x^2) + eps) * w`` over the last axis."""
    return _affine(x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt(), w, None)


def _affine(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    x = x if w is None else x * w
    return x if b is None else x + b


def rotary(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "#batch pos rotary_dim"],
    sin: Float[Tensor, "#batch pos rotary_dim"],
    adjacent_pairs: bool,
) -> Float[Tensor, "batch pos head d_head"]:
    """``x * cos + turned(x) * sin`` on the first ``rotary_dim`` channels (Su et al. 2104.09864)."""
    rotary_dim = cos.shape[-1]
    turning, passing = x[..., :rotary_dim], x[..., rotary_dim:]
    if adjacent_pairs:
        turned = torch.stack([-turning[..., 1::2], turning[..., ::2]], -1).flatten(-2)
    else:
        first, second = turning.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    rotated = turning * cos[:, :, None] + turned * sin[:, :, None]
    return torch.cat([rotated, passing], -1)


def attention_scores(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """Scores before the softmax, minus infinity where a key is not visible.

    Query row i stands at absolute position ``offset + i``; query head h reads KV head
    ``h // (heads / kv_heads)``.
    """
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / rule.scale
    if rule.soft_cap > 0:
        scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
    queries = torch.arange(offset, offset + q.shape[1], device=q.device)
    keys = torch.arange(k.shape[1], device=q.device)
    if rule.alibi:
        distance = (keys[None, :] - queries[:, None]).clamp(max=0)
        scores = scores + alibi_slopes(q.shape[2], q.device, q.dtype)[:, None, None] * distance
    visible = visibility(rule, queries, keys, key_mask)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def attention_pattern(
    scores: Float[Tensor, "batch head query_pos key_pos"],
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """Softmax over keys; a row that sees no key is all zeros, not NaN."""
    return torch.softmax(scores, -1).nan_to_num(nan=0.0)


def attention_with_pattern(
    pattern: Float[Tensor, "batch head query_pos key_pos"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
) -> Float[Tensor, "batch query_pos head d_head"]:
    """Values mixed by a given pattern."""
    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v)


def attention(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """``softmax(scores) @ v``, with every score held at once."""
    pattern = attention_pattern(attention_scores(q, k, rule, offset, key_mask))
    return attention_with_pattern(pattern, v)


def score_rows(
    q: Float[Tensor, "row d_head"],
    k: Float[Tensor, "row key_pos d_head"],
    rule: AttentionRule,
    query_pos: Int[Tensor, " row"],
    head: Int[Tensor, " row"],
    n_heads: int,
    key_mask: Bool[Tensor, "row key_pos"] | None = None,
) -> Float[Tensor, "row key_pos"]:
    """Single rows of `attention_scores`, each of its own head, position and keys.

    Args:
        query_pos: Absolute position of each row; its keys start at position 0.
        head, n_heads: Which head it is, of how many: ALiBi's slope depends on it.
    """
    scores = torch.einsum("rd,rkd->rk", q, k) / rule.scale
    if rule.soft_cap > 0:
        scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
    keys = torch.arange(k.shape[1], device=q.device)
    behind = keys[None, :] - query_pos[:, None]
    if rule.alibi:
        slopes = alibi_slopes(n_heads, q.device, q.dtype)[head]
        scores = scores + slopes[:, None] * behind.clamp(max=0)
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if rule.causal:
        hidden = hidden | (behind > 0)
    if rule.window is not None:
        hidden = hidden | (behind <= -rule.window)
    if key_mask is not None:
        hidden = hidden | ~key_mask
    return scores.masked_fill(hidden, -torch.inf)
