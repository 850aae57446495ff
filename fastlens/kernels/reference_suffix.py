"""The specification of attention over packed rows: row by row, each with the keys it sees."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.kernels.masks import AttentionRule, alibi_slopes
from fastlens.kernels.spans import Span


def suffix_attention(
    q: Float[Tensor, "row head d_head"],
    k: Float[Tensor, "row kv_head d_head"],
    v: Float[Tensor, "row kv_head d_head"],
    table: Int[Tensor, "branch pos"],
    spans: Sequence[Span],
    rule: AttentionRule,
    key_mask: Bool[Tensor, "branch pos"] | None = None,
) -> Float[Tensor, "out_row head d_head"]:
    """For each span, branch and position, in this order: the row attends to what it may see."""
    out = [
        _row(q, k, v, table[branch], pos, rule, None if key_mask is None else key_mask[branch])
        for span in spans
        for branch in span.branches.tolist()
        for pos in range(span.start, span.stop)
    ]
    return torch.stack(out) if out else q.new_empty(0, q.shape[1], v.shape[2])


def _row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Int[Tensor, " pos"],
    pos: int,
    rule: AttentionRule,
    key_mask: Bool[Tensor, " pos"] | None,
) -> Float[Tensor, "head d_head"]:
    """One query; ``rows`` says which packed row stands at each position of its branch."""
    keys = torch.arange(len(rows), device=q.device)
    seen = torch.ones_like(keys, dtype=torch.bool)
    if rule.causal:
        seen &= keys <= pos
    if rule.window is not None:
        seen &= keys > pos - rule.window
    if key_mask is not None:
        seen &= key_mask
    keys = keys[seen]
    group = q.shape[1] // k.shape[1]
    k, v = (x[rows[seen]].repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("hd,khd->hk", q[rows[pos]], k) / rule.scale
    if rule.soft_cap > 0:
        scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
    if rule.alibi:
        slopes = alibi_slopes(q.shape[1], q.device, q.dtype)
        scores = scores + slopes[:, None] * (keys - pos).clamp(max=0)
    # Of no key at all the sum is zero.
    return torch.einsum("hk,khd->hd", torch.softmax(scores, -1), v)
