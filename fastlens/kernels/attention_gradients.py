"""Gradients of attention and of its patterns, built again in blocks of query rows.

What the registered ops have as their backward, whichever kernel ran forward. Where a gradient of
the gradient is recorded (``create_graph=True``), it is that of the specification, which holds every
score.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.kernels import reference_attention as reference
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.score_blocks import Block, ScoreBlocks, kept, rows_of, softmax

# Elements of keys that are gathered at a time for single rows.
GATHERED = 2**22


class AttentionGradients(NamedTuple):
    """One for each differentiable input of `attention`, in its dtype; None where none is needed."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None


class ScoreGradients(NamedTuple):
    """One for each differentiable input of scores, in its dtype; None where none is needed."""

    q: Tensor | None
    k: Tensor | None
    bias: Tensor | None


def attention_gradients(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int,
    key_mask: Bool[Tensor, "batch key_pos"] | None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None,
    grad_z: Float[Tensor, "batch query_pos head d_head"],
    needs_bias: bool = False,
) -> AttentionGradients:
    """Of the sum of ``z * grad_z``; a row that sees no key has none.

    Numerics: in float32 for 16-bit inputs, rounded once.
    """
    if torch.is_grad_enabled():
        z = reference.attention(q, k, v, rule, offset, key_mask, bias)
        return AttentionGradients(*_of_graph(z, (q, k, v, bias if needs_bias else None), grad_z))
    blocks = ScoreBlocks(q, k, rule, None, None, offset, key_mask, bias)
    to_scores = _ToInputs(blocks, q, k, needs_bias)
    values = blocks.keyed(v)
    grad_v = torch.zeros_like(values)
    for block in blocks:
        product = blocks.product(block)
        scores = blocks.finished_(product.clone() if rule.soft_cap > 0 else product, block)
        pattern = softmax(scores, blocks.can_be_blind)
        grad = blocks.grouped(rows_of(grad_z, 1, block.rows))
        to_pattern = torch.bmm(grad, rows_of(values, 1, block.keys).transpose(1, 2)).view(
            pattern.shape
        )
        weights = pattern.view(grad.shape[0], grad.shape[1], -1)
        rows_of(grad_v, 1, block.keys).baddbmm_(weights.transpose(1, 2), grad)
        to_scores.add(block, _through_softmax(pattern, to_pattern), product)
    grad_v = _to_kv_heads(blocks, grad_v, v)
    return AttentionGradients(to_scores.q(), to_scores.k(), grad_v, to_scores.bias)


def pattern_gradients(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    heads: Sequence[int] | None,
    rows: Sequence[int] | None,
    offset: int,
    key_mask: Bool[Tensor, "batch key_pos"] | None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None,
    pattern: Float[Tensor, "batch kept_head kept_row key_pos"],
    grad: Float[Tensor, "batch kept_head kept_row key_pos"],
    scores: bool = False,
    needs_bias: bool = False,
) -> ScoreGradients:
    """Of the sum of ``pattern * grad``.

    Args:
        pattern: What `attention_pattern` gave for the other arguments.
        scores: Whether that were scores before the softmax.
    """
    if torch.is_grad_enabled():
        again = reference.attention_scores(q, k, rule, offset, key_mask, bias)
        again = again if scores else reference.pattern_of(again)
        again = again if heads is None else again[:, list(heads)]
        again = again if rows is None else again[:, :, list(rows)]
        return ScoreGradients(*_of_graph(again, (q, k, bias if needs_bias else None), grad))
    blocks = ScoreBlocks(q, k, rule, heads, rows, offset, key_mask, bias)
    to_scores = _ToInputs(blocks, q, k, needs_bias)
    for block in blocks:
        found, to_found = (
            rows_of(rows_of(x, 2, block.rows), 3, block.keys).to(blocks.dtype)
            for x in (pattern, grad)
        )
        if scores:
            to_block = to_found.masked_fill(found == -torch.inf, 0.0)
        else:
            to_block = _through_softmax(found, to_found)
        product = blocks.product(block) if rule.soft_cap > 0 else None
        to_scores.add(block, to_block, product)
    return ScoreGradients(to_scores.q(), to_scores.k(), to_scores.bias)


def row_gradients(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    sites: Int[Tensor, "site 3"],
    offset: int,
    key_mask: Bool[Tensor, "batch key_pos"] | None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None,
    pattern: Float[Tensor, "site key_pos"],
    grad: Float[Tensor, "site key_pos"],
    scores: bool = False,
) -> ScoreGradients:
    """Of the sum of ``pattern * grad`` over single rows, for q and k; none for the bias.

    Args:
        pattern: What `attention_pattern_rows` gave for these sites.
        scores: Whether that were scores before the softmax.
    """
    if torch.is_grad_enabled():
        rest = rule, sites, offset, key_mask, None, scores, bias
        again = reference.attention_pattern_rows(q, k, *rest)
        return ScoreGradients(*_of_graph(again, (q, k, None), grad))
    dtype = torch.promote_types(torch.float32, q.dtype)
    grad_q, grad_k = torch.zeros_like(q, dtype=dtype), torch.zeros_like(k, dtype=dtype)
    of_heads = k.transpose(1, 2)  # [batch, kv_head, key_pos, d_head]
    size = max(1, GATHERED // max(1, int(k.shape[1] * k.shape[3])))
    parts = (x.split(size) for x in (sites, pattern.to(dtype), grad.to(dtype)))
    for named, found, to_found in zip(*parts, strict=True):
        example, head, row = named.unbind(1)
        kv_head = head // (q.shape[2] // k.shape[2])
        queries, keys = q[example, row, head].to(dtype), of_heads[example, kv_head].to(dtype)
        if scores:
            to_scores = to_found.masked_fill(found == -torch.inf, 0.0)
        else:
            to_scores = _through_softmax(found, to_found)
        if rule.soft_cap > 0:
            product = torch.einsum("sd,skd->sk", queries, keys)
            capped = torch.tanh(product / (rule.scale * rule.soft_cap))
            to_scores = to_scores * (1 - capped.square())
        to_scores = to_scores / rule.scale
        # A site may stand in the table more than once.
        to_q = torch.einsum("sk,skd->sd", to_scores, keys)
        grad_q.index_put_((example, row, head), to_q, accumulate=True)
        to_k = to_scores[:, :, None] * queries[:, None, :]
        grad_k.transpose(1, 2).index_put_((example, kv_head), to_k, accumulate=True)
    return ScoreGradients(grad_q.to(q.dtype), grad_k.to(k.dtype), None)


def _of_graph(out: Tensor, inputs: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    """Differentiable gradients of those inputs that ask for one; None for the others."""
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(out, leaves, grad, create_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


class _ToInputs:
    """Gathers the gradients of scores, block by block, into those of q, k and bias."""

    def __init__(self, blocks: ScoreBlocks, q: Tensor, k: Tensor, needs_bias: bool):
        self.blocks, self._q, self._k = blocks, q, k
        batch, n_heads, n_rows, _ = blocks.shape
        self._to_q = q.new_zeros(batch, n_rows, n_heads, q.shape[-1], dtype=blocks.dtype)
        self._to_k = torch.zeros_like(blocks.k)
        self.bias: Tensor | None = None
        if needs_bias and blocks.bias is not None:
            self.bias = torch.zeros_like(blocks.bias, memory_format=torch.contiguous_format)

    def add(self, block: Block, to_scores: Tensor, capped: Tensor | None) -> None:
        """One block's; ``capped`` is the soft-capped product, read only where there is a cap."""
        blocks, rule = self.blocks, self.blocks.rule
        if self.bias is not None:
            self._add_bias(self.bias, block, to_scores)
        if rule.soft_cap > 0:
            assert capped is not None
            to_scores = to_scores * (1 - (capped / rule.soft_cap).square())
        queries = blocks.queries(block)
        grad = to_scores.reshape(queries.shape[0], queries.shape[1], -1)
        rows_of(self._to_k, 1, block.keys).baddbmm_(grad.transpose(1, 2), queries)
        to_q = torch.bmm(grad, rows_of(blocks.k, 1, block.keys)) / rule.scale
        n_rows = to_scores.shape[2]
        rows_of(self._to_q, 1, block.rows).copy_(blocks.ungrouped(to_q, n_rows).transpose(1, 2))

    def _add_bias(self, bias: Tensor, block: Block, to_scores: Tensor) -> None:
        wanted = (bias.shape[0], to_scores.shape[1] if bias.shape[1] > 1 else 1)
        part = to_scores.sum_to_size(*wanted, *to_scores.shape[2:]).to(bias.dtype)
        rows, heads = self.blocks.rows[block.rows], self.blocks.heads
        device = bias.device
        at_heads = torch.tensor(heads if bias.shape[1] > 1 else [0], device=device)
        at = at_heads[:, None], torch.tensor(rows, device=device)[None, :]
        # Heads and rows may be named more than once.
        keyed = rows_of(bias, 3, block.keys)
        for example in range(bias.shape[0]):
            keyed[example].index_put_(at, part[example], accumulate=True)

    def q(self) -> Tensor:
        """In the places of q."""
        to_q = _placed(self._to_q, 2, self.blocks.heads, self._q)
        return _placed(to_q, 1, self.blocks.rows, self._q).to(self._q.dtype)

    def k(self) -> Tensor:
        """In the places of k."""
        return _to_kv_heads(self.blocks, self._to_k, self._k)


def _through_softmax(pattern: Tensor, grad: Tensor) -> Tensor:
    """The gradient of scores, given that of their softmax."""
    return pattern * (grad - (pattern * grad).sum(-1, keepdim=True))


def _to_kv_heads(blocks: ScoreBlocks, grad: Tensor, like: Tensor) -> Tensor:
    grad = grad.view(like.shape[0], len(blocks.kv_heads), like.shape[1], -1).transpose(1, 2)
    return _placed(grad, 2, blocks.kv_heads, like).to(like.dtype)


def _placed(x: Tensor, axis: int, indices: Sequence[int], like: Tensor) -> Tensor:
    """Zeros as long as ``like`` along an axis, with ``x`` added at its indices."""
    length = int(like.shape[axis])
    if len(indices) == length and kept(x, axis, indices) is x:
        return x
    shape = list(x.shape)
    shape[axis] = length
    at = torch.tensor(indices, dtype=torch.int64, device=x.device)
    return x.new_zeros(shape).index_add_(axis, at, x)
