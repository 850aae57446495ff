"""The specification of attention: scores, pattern, values, and what is summed over them."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.kernels.masks import AttentionRule, KeyGroup, alibi_slopes, visibility


def attention_scores(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
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
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    visible = visibility(rule, queries, keys, key_mask)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def pattern_of(
    scores: Float[Tensor, "*rows key_pos"],
) -> Float[Tensor, "*rows key_pos"]:
    """Softmax over keys; a row that sees no key is all zeros, not NaN, and has no gradient."""
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)


def attention_pattern(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
    lse: Float[Tensor, "batch head query_pos"] | None = None,
    scores: bool = False,
) -> Float[Tensor, "batch kept_head kept_row key_pos"]:
    """Chosen heads and rows of the pattern or of the scores, rounded once to the dtype of q."""
    dtype = torch.promote_types(torch.float32, q.dtype)
    heads = range(q.shape[2]) if heads is None else heads
    rows = range(q.shape[1]) if rows is None else rows
    found = attention_scores(q.to(dtype), k.to(dtype), rule, offset, key_mask, bias)
    found = found[:, list(heads)][:, :, list(rows)]
    if not scores and lse is None:
        found = pattern_of(found)
    elif not scores:
        assert lse is not None
        of_rows = lse[:, list(heads)][:, :, list(rows)]
        found = torch.exp(found - of_rows[..., None]).nan_to_num(nan=0.0)
    return found.to(q.dtype)


def attention_with_pattern(
    pattern: Float[Tensor, "batch head query_pos key_pos"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    heads: Sequence[int] | None = None,
    n_heads: int | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """Values mixed by a given pattern: of all heads in order, or of ``heads`` among ``n_heads``.

    With ``heads`` and no ``n_heads``, as many query heads as there are heads of values.
    """
    if heads is None:
        heads, n_heads = range(pattern.shape[1]), pattern.shape[1]
    group = 1 if n_heads is None else n_heads // v.shape[2]
    of_heads = v[:, :, [head // group for head in heads]]
    return torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), of_heads)


def attention(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """``softmax(scores) @ v``, with every score held at once."""
    pattern = pattern_of(attention_scores(q, k, rule, offset, key_mask, bias))
    return attention_with_pattern(pattern, v)


def attention_lse(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> tuple[Float[Tensor, "batch query_pos head d_head"], Float[Tensor, "batch head query_pos"]]:
    """`attention`, and ``log(sum(exp(scores)))`` of each row without a gradient.

    The log-sum-exp is float32 or wider; minus infinity for a row that sees no key.
    """
    scores = attention_scores(q, k, rule, offset, key_mask, bias)
    wide = scores.detach().to(torch.promote_types(torch.float32, scores.dtype))
    return attention_with_pattern(pattern_of(scores), v), wide.logsumexp(-1)


def attention_pattern_rows(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    sites: Int[Tensor, "site 3"],
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    lse: Float[Tensor, "batch head query_pos"] | None = None,
    scores: bool = False,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> Float[Tensor, "site key_pos"]:
    """Rows (example, head, query row) of the pattern or of the scores, in float32 or wider."""
    dtype = torch.promote_types(torch.float32, q.dtype)
    example, head, row = sites.unbind(1)
    every = attention_scores(q.to(dtype), k.to(dtype), rule, offset, key_mask, bias)
    found = every[example, head, row]
    if scores:
        return found
    if lse is None:
        return pattern_of(found)
    return torch.exp(found - lse[example, head, row, None]).nan_to_num(nan=0.0)


def attention_summary(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    heads: Sequence[int] | None = None,
    offsets: Sequence[int] = (),
    groups: Sequence[KeyGroup] = (),
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> tuple[
    Float[Tensor, "batch kept_head query_pos"],
    Float[Tensor, "n_offsets batch kept_head query_pos"],
    Float[Tensor, "n_groups batch kept_head query_pos"],
]:
    """Entropy, mass on offsets and mass on label groups of each row, in float32 or wider."""
    dtype = torch.promote_types(torch.float32, q.dtype)
    scores = attention_scores(q.to(dtype), k.to(dtype), rule, offset, key_mask, bias)
    pattern = pattern_of(scores if heads is None else scores[:, list(heads)])
    queries = torch.arange(offset, offset + q.shape[1], device=q.device)[:, None]
    keys = torch.arange(k.shape[1], device=q.device)[None, :]
    entropy = torch.special.entr(pattern).sum(-1)
    on_offsets = [(pattern * (queries - keys == back)).sum(-1) for back in offsets]
    on_groups = []
    for group in groups:
        same = (group.query_labels[:, :, None] == group.key_labels[:, None, :]) & (
            group.query_labels[:, :, None] >= 0
        )
        if group.strict:
            same = same & (queries != keys)
        on_groups.append((pattern * same[:, None]).sum(-1))
    none = pattern.new_empty(0, *pattern.shape[:3])
    return (
        entropy,
        torch.stack(on_offsets) if on_offsets else none,
        torch.stack(on_groups) if on_groups else none,
    )


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
