"""What attention's scores are made of, for those who look at some of them."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.hooks.point import HookPoint, is_live
from fastlens.kernels.masks import AttentionRule
from fastlens.ops.attention_pattern import attention_pattern, attention_with_pattern
from fastlens.ops.attention_sinks import pattern_from


class Attended(NamedTuple):
    """What the scores of one layer are made of, after QK-norm and rotary.

    Attributes:
        q: ``[batch, query_pos, head, d_head]``.
        k: ``[batch, key_pos, kv_head, d_head]``, with the keys of a KV cache.
        rule, offset, key_mask, bias: As `fastlens.ops.attention.attention` takes them.
        sinks: One more score a head, as `fastlens.ops.attention_sinks` takes them.
    """

    q: Tensor
    k: Tensor
    rule: AttentionRule
    offset: int
    key_mask: Tensor | None
    bias: Tensor | None = None
    sinks: Tensor | None = None

    def detached(self) -> "Attended":
        """The same without a graph behind it."""
        bias = None if self.bias is None else self.bias.detach()
        sinks = None if self.sinks is None else self.sinks.detach()
        return self._replace(q=self.q.detach(), k=self.k.detach(), bias=bias, sinks=sinks)


@runtime_checkable
class AttentionTap(Protocol):
    """What a run puts on a layer to make cache entries of its scores and pattern."""

    def fused(self, attended: Attended) -> None:
        """Attention ran fused on these queries and keys."""
        ...

    def materialised(self, scores: Tensor, pattern: Tensor) -> None:
        """Scores and pattern were made, and passed their hooks."""
        ...


def with_heads_looked_at(
    z: Float[Tensor, "batch query_pos head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    attended: Attended,
    heads: tuple[int, ...],
    points: tuple[HookPoint, HookPoint],
) -> Float[Tensor, "batch query_pos head d_head"]:
    """Show these heads' scores and pattern to their hooks; mix anew what a hook changed.

    Args:
        z: What attention gave, fused.
        heads: Indices, rising.
        points: Where scores and pattern pass.

    Raises: ShapeError for a head that is not there.
    """
    q, k, rule, offset, key_mask, bias, sinks = attended
    in_scores, in_pattern = points
    if heads[-1] >= q.shape[2]:
        raise ShapeError(
            f"a hook on {in_pattern.name!r} or the scores was given head {heads[-1]}, and there "
            f"are {q.shape[2]} heads, counted from 0."
        )
    scores = attention_pattern(
        q, k, rule, heads=heads, offset=offset, key_mask=key_mask, bias=bias, scores=True
    )
    if scores.requires_grad:
        # What an autograd function returned may not be written to.
        scores = scores.clone()
    seen = _shown(in_scores, scores, heads)
    beside = None if sinks is None else sinks[list(heads)][:, None]
    pattern = pattern_from(scores if seen is None else seen, beside)
    edited = _shown(in_pattern, pattern, heads)
    if seen is None and edited is None:
        return z
    pattern = pattern if edited is None else edited
    pattern = pattern.to(device=v.device, dtype=v.dtype)
    mixed = attention_with_pattern(pattern, v, heads=heads, n_heads=q.shape[2])
    return z.index_copy(2, torch.tensor(heads, device=z.device), mixed)


def sum_of(
    added: Sequence[Float[Tensor, "#batch #head #query_pos key_pos"]], n_queries: int
) -> Float[Tensor, "#batch #head query_pos key_pos"] | None:
    """All that is added to the scores, as one bias; None if nothing is."""
    if not added:
        return None
    bias = added[0] if len(added) == 1 else sum(added[1:], added[0])
    # A padding mask is one row for all queries: no copy of it is made.
    return bias.expand(-1, -1, n_queries, -1)


def _shown(point: HookPoint, activation: Tensor, heads: tuple[int, ...]) -> Tensor | None:
    """What a hook on some heads made of them; None if they are as they were."""
    if not is_live(point):
        return None
    # Writes to inference tensors leave no trace.
    version = None if activation.is_inference() else activation._version
    # A hook may run the model, and so come here again.
    before, point.held_heads = point.held_heads, heads
    try:
        answer = point(activation)
    finally:
        point.held_heads = before
    if answer is activation and version is not None and activation._version == version:
        return None
    return answer
