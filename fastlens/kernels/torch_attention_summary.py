"""Entropy and mass of patterns in plain PyTorch, from blocks of query rows."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule, KeyGroup
from fastlens.kernels.score_blocks import ScoreBlocks, rows_of, softmax


@torch.no_grad()
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
    """See `fastlens.ops.attention_summary.attention_summary`."""
    blocks = ScoreBlocks(q, k, rule, heads, None, offset, key_mask, bias)
    shape = blocks.shape[:3]
    entropy = q.new_zeros(shape, dtype=blocks.dtype)
    on_offsets = q.new_zeros((len(offsets), *shape), dtype=blocks.dtype)
    on_groups = q.new_zeros((len(groups), *shape), dtype=blocks.dtype)
    for block in blocks:
        keys = block.keys
        if keys.stop <= keys.start:
            continue
        pattern = softmax(blocks.scores(block), blocks.can_be_blind)
        positions = torch.arange(block.rows.start, block.rows.stop, device=q.device) + offset
        rows_of(entropy, 2, block.rows).copy_(torch.special.entr(pattern).sum(-1))
        for number, back in enumerate(offsets):
            column = positions - back - keys.start
            is_key = (column >= 0) & (column < keys.stop - keys.start)
            index = column.where(is_key, 0).view(1, 1, -1, 1).expand(*pattern.shape[:3], 1)
            mass = pattern.gather(-1, index).squeeze(-1)
            rows_of(on_offsets.select(0, number), 2, block.rows).copy_(
                mass.masked_fill(~is_key, 0.0)
            )
        columns = torch.arange(keys.start, keys.stop, device=q.device)
        for number, group in enumerate(groups):
            asked = rows_of(group.query_labels, 1, block.rows).unsqueeze(2)
            same = (asked == rows_of(group.key_labels, 1, keys).unsqueeze(1)) & (asked >= 0)
            if group.strict:
                same = same & (positions.unsqueeze(1) != columns)
            mass = torch.where(same.unsqueeze(1), pattern, 0.0).sum(-1)
            rows_of(on_groups.select(0, number), 2, block.rows).copy_(mass)
    return entropy, on_offsets, on_groups


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel("attention_summary", "torch in blocks", attention_summary, _refuses, priority=10)
