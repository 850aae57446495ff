"""Attention scores of chosen heads and query rows in plain PyTorch, a block of rows at a time."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.kernels.masks import AttentionRule, alibi_slopes, visibility, visible_keys

# A block has at most so many query rows, and fewer where it would have more scores than this.
ROWS_PER_BLOCK = 512
SCORES_PER_BLOCK = 2**22
FEWEST_ROWS = 16


class Block(NamedTuple):
    """Some of the kept rows, and the range of keys that any of them sees.

    Attributes:
        rows: Among the kept rows, counted from the first kept one.
        keys: Absolute positions; may be empty.
    """

    rows: slice
    keys: slice


class ScoreBlocks:
    """What `reference.attention_scores` gives for some heads and rows, made block by block.

    Only the kept heads of q and the KV heads they read are touched; keys are never repeated for
    the query heads of a group that is kept whole.

    Args:
        heads, rows: Indices of what is kept, in the order wanted; None keeps all.
        bias: Added after soft-cap and ALiBi.

    Attributes:
        dtype: Of scores: float32 for 16-bit inputs, else that of q.
        shape: Of all scores kept, ``[batch, head, row, key_pos]``.
    """

    def __init__(
        self,
        q: Float[Tensor, "batch query_pos head d_head"],
        k: Float[Tensor, "batch key_pos kv_head d_head"],
        rule: AttentionRule,
        heads: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        offset: int = 0,
        key_mask: Bool[Tensor, "batch key_pos"] | None = None,
        bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
    ):
        self.rule, self.offset, self.key_mask, self.bias = rule, int(offset), key_mask, bias
        # A compiler may hand over symbols: blocks are counted in numbers.
        batch, n_queries, self.n_heads, _ = (int(n) for n in q.shape)
        n_keys, kv_heads = int(k.shape[1]), int(k.shape[2])
        self.heads = range(self.n_heads) if heads is None else heads
        self.rows = range(n_queries) if rows is None else rows
        self.dtype = torch.float32 if q.element_size() == 2 else q.dtype
        self.shape = (batch, len(self.heads), len(self.rows), n_keys)
        group = self.n_heads // max(1, kv_heads)
        self.kv_heads, self.per_kv_head = shared_kv_heads(self.heads, group)
        self.q = kept(q, 2, self.heads)
        self.k = self.keyed(k)

    def __iter__(self) -> Iterator[Block]:
        batch, n_heads, n_rows, n_keys = self.shape
        fitting = SCORES_PER_BLOCK // max(1, batch * n_heads * n_keys)
        step = min(ROWS_PER_BLOCK, max(FEWEST_ROWS, fitting))
        for start in range(0, n_rows, step):
            rows = slice(start, min(n_rows, start + step))
            here = self.rows[rows]
            first, last = self.offset + min(here), self.offset + max(here)
            low, high = visible_keys(self.rule, n_keys, first, last + 1)
            yield Block(rows, slice(min(low, high), high))

    def keyed(self, x: Float[Tensor, "batch key_pos kv_head d"]) -> Tensor:
        """The KV heads that the kept heads read, ``[batch * kv_head, key_pos, d]``."""
        return kept(x, 2, self.kv_heads).permute(0, 2, 1, 3).flatten(0, 1).to(self.dtype)

    def grouped(self, x: Float[Tensor, "batch row kept_head d"]) -> Tensor:
        """Rows of heads with the same keys side by side, ``[batch * kv_head, head * row, d]``."""
        x = x.to(self.dtype).unflatten(2, (len(self.kv_heads), self.per_kv_head))
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)

    def ungrouped(self, x: Tensor, n_rows: int) -> Float[Tensor, "batch kept_head row d"]:
        """The inverse of `grouped`, but for the order of the axes."""
        return x.view(self.shape[0], self.shape[1], n_rows, x.shape[-1])

    def queries(self, block: Block) -> Tensor:
        """The block's queries divided by the scale, `grouped`."""
        return self.grouped(kept(self.q, 1, self.rows[block.rows])) / self.rule.scale

    def product(self, block: Block) -> Float[Tensor, "batch kept_head row key"]:
        """``q . k / scale``, soft-capped: a new tensor."""
        product = torch.bmm(self.queries(block), rows_of(self.k, 1, block.keys).transpose(1, 2))
        if self.rule.soft_cap > 0:
            product = product.div_(self.rule.soft_cap).tanh_().mul_(self.rule.soft_cap)
        return self.ungrouped(product, len(self.rows[block.rows]))

    def finished_(
        self, product: Float[Tensor, "batch kept_head row key"], block: Block
    ) -> Float[Tensor, "batch kept_head row key"]:
        """The product made into scores in place: ALiBi, bias, minus infinity where not visible."""
        device, keys = product.device, block.keys
        here = self.rows[block.rows]
        if isinstance(here, range) and here.step == 1:
            positions = torch.arange(
                self.offset + here.start, self.offset + here.stop, device=device
            )
        else:
            positions = torch.tensor(here, dtype=torch.int64, device=device) + self.offset
        if self.rule.alibi:
            columns = torch.arange(keys.start, keys.stop, device=device)
            distance = (columns[None, :] - positions[:, None]).clamp(max=0)
            slopes = kept(alibi_slopes(self.n_heads, device, self.dtype), 0, self.heads)
            product += slopes[:, None, None] * distance
        if self.bias is not None:
            product += self.bias_of(block)
        # Without mask and window, all rows see the keys up to the first row's own.
        start = keys.start
        if self.key_mask is None and self.rule.window is None:
            start = min(max(start, self.offset + min(here) + 1), keys.stop)
        seen = slice(start, keys.stop)
        mask = None if self.key_mask is None else rows_of(self.key_mask, 1, seen)
        columns = torch.arange(start, keys.stop, device=device)
        visible = visibility(self.rule, positions, columns, mask)
        if visible is not None:
            late = slice(start - keys.start, keys.stop - keys.start)
            rows_of(product, 3, late).masked_fill_(~visible, -torch.inf)
        return product

    def scores(self, block: Block) -> Float[Tensor, "batch kept_head row key"]:
        """The block's scores: a new tensor, minus infinity where a key is not visible."""
        return self.finished_(self.product(block), block)

    def bias_of(self, block: Block) -> Float[Tensor, "#batch #kept_head row key"]:
        """What is added to the block's scores."""
        assert self.bias is not None
        bias = self.bias if self.bias.shape[1] == 1 else kept(self.bias, 1, self.heads)
        return rows_of(kept(bias, 2, self.rows[block.rows]), 3, block.keys)

    @property
    def can_be_blind(self) -> bool:
        """Whether a row may see no key at all: with mask or bias, or queries beyond the keys."""
        is_beyond = self.rule.window is not None and self.offset + max(self.rows) >= self.shape[3]
        return self.key_mask is not None or self.bias is not None or is_beyond


def softmax(
    scores: Float[Tensor, "*rows key"], can_be_blind: bool = True
) -> Float[Tensor, "*rows key"]:
    """Over keys; zeros, not NaN, in a row of minus infinity alone (only if it can be such)."""
    weights = torch.softmax(scores, -1)
    if can_be_blind and scores.shape[-1]:
        weights.masked_fill_(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)
    return weights


def rows_of(x: Tensor, axis: int, places: slice) -> Tensor:
    """The view ``x[..., places, ...]`` along an axis."""
    return x.narrow(axis, places.start, places.stop - places.start)


def kept(x: Tensor, axis: int, indices: Sequence[int]) -> Tensor:
    """The named places of an axis: a view where they stand behind one another, else a copy."""
    n = len(indices)
    first = indices[0] if n else 0
    if isinstance(indices, range):
        is_run = n <= 1 or indices.step == 1
    else:
        is_run = all(index == first + i for i, index in enumerate(indices))
    if is_run:
        return x if n == x.shape[axis] else x.narrow(axis, first, n)
    return x.index_select(axis, torch.tensor(indices, dtype=torch.int64, device=x.device))


def shared_kv_heads(heads: Sequence[int], group: int) -> tuple[Sequence[int], int]:
    """The KV heads to read, and how many of the heads, in their order, share each.

    Where heads that share are not behind one another, each gets its own.

    Args:
        group: How many query heads read one KV head.
    """
    if group == 1:
        return heads, 1
    of_each = [head // group for head in heads]
    distinct = list(dict.fromkeys(of_each))
    each = len(of_each) // max(1, len(distinct))
    if of_each == [kv_head for kv_head in distinct for _ in range(each)]:
        return distinct, each
    return of_each, 1
