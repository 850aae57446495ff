"""Chosen heads and rows of the pattern in plain PyTorch, in blocks of query rows."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.kernels.attention_gradients import pattern_gradients
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.score_blocks import ScoreBlocks, kept, rows_of, softmax


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
    """See `fastlens.ops.attention_pattern.attention_pattern`."""
    arguments = q, k, bias, rule, heads, rows, offset, key_mask, lse, scores
    leaves = [x for x in (q, k, bias) if x is not None and x.requires_grad]
    if leaves and torch.is_grad_enabled():
        return _Pattern.apply(*arguments)
    return _forward(*arguments)


@torch.no_grad()
def _forward(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    rule: AttentionRule,
    heads: Sequence[int] | None,
    rows: Sequence[int] | None,
    offset: int,
    key_mask: Tensor | None,
    lse: Tensor | None,
    scores: bool,
) -> Tensor:
    blocks = ScoreBlocks(q, k, rule, heads, rows, offset, key_mask, bias)
    n_rows, n_keys = blocks.shape[2:]
    hidden = -torch.inf if scores else 0.0
    out = None
    if lse is not None:
        # A row that sees no key has weights exp(-inf - inf).
        lse = kept(lse, 1, blocks.heads)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf).to(blocks.dtype)
    for block in blocks:
        found = blocks.scores(block)
        if not scores:
            if lse is None:
                found = softmax(found, blocks.can_be_blind)
            else:
                found.sub_(kept(lse, 2, blocks.rows[block.rows])[..., None]).exp_()
        if found.shape[2:] == (n_rows, n_keys) and found.dtype == q.dtype:
            return found
        if out is None:
            out = q.new_empty(blocks.shape)
        here = rows_of(out, 2, block.rows)
        rows_of(here, 3, slice(0, block.keys.start)).fill_(hidden)
        rows_of(here, 3, block.keys).copy_(found)
        rows_of(here, 3, slice(block.keys.stop, n_keys)).fill_(hidden)
    return q.new_zeros(blocks.shape) if out is None else out


class _Pattern(torch.autograd.Function):
    """Keeps the pattern alone; the backward goes over blocks of query rows again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:  # type: ignore[override]
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, bias, rule, heads, rows, offset, key_mask, _, scores = inputs
        ctx.save_for_backward(q, k, bias, key_mask, output)
        ctx.rest = rule, heads, rows, offset, scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        q, k, bias, key_mask, out = ctx.saved_tensors
        rule, heads, rows, offset, scores = ctx.rest
        needs_bias = ctx.needs_input_grad[2]
        grads = pattern_gradients(
            q, k, rule, heads, rows, offset, key_mask, bias, out, grad, scores, needs_bias
        )
        return *grads, *(None,) * 7


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel("attention_pattern", "torch in blocks", attention_pattern, _refuses, priority=10)
