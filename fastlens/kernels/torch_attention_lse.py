"""Attention with its log-sum-exp: from PyTorch's fused CPU kernel, or from blocks of scores."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.score_blocks import ScoreBlocks, rows_of
from fastlens.kernels.torch_attention import (
    RowBlock,
    attention,
    mask_of,
    needs_no_mask,
    row_blocks,
    unseeing,
)

# Private to PyTorch: without it, scores are made once more.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def attention_lse(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> tuple[Float[Tensor, "batch query_pos head d_head"], Float[Tensor, "batch head query_pos"]]:
    """See `fastlens.ops.attention.attention_with_lse`."""
    whole = RowBlock(q, k, v, rule, offset, key_mask, bias)
    if not _is_flash(whole):
        lse = log_sum_exp(q, k, rule, offset, key_mask, bias)
        return attention(q, k, v, rule, offset, key_mask, bias), lse
    unmasked = needs_no_mask(whole)
    if unmasked is not None:
        return _flash(whole, is_causal=unmasked == "causal")
    parts = [_rows(block) for block in row_blocks(whole)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([z for z, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)


@torch.no_grad()
def log_sum_exp(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> Float[Tensor, "batch head query_pos"]:
    """``log(sum(exp(scores)))`` of each row in nats, from blocks of scores."""
    blocks = ScoreBlocks(q, k, rule, None, None, offset, key_mask, bias)
    lse = q.new_full(blocks.shape[:3], -torch.inf, dtype=blocks.dtype)
    for block in blocks:
        if block.keys.stop > block.keys.start:
            rows_of(lse, 2, block.rows).copy_(blocks.scores(block).logsumexp(-1))
    return lse


def _is_flash(whole: RowBlock) -> bool:
    """Whether PyTorch's fused CPU kernel serves: it knows no soft-cap and no gradient of a bias,
    and kills the process over an empty axis."""
    q, k, v, rule, _, _, bias = whole
    learns_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    return (
        _FLASH is not None
        and q.device.type == "cpu"
        and rule.soft_cap <= 0
        and not learns_bias
        and bool(q.numel() and k.numel())
        and v.shape[-1] == q.shape[-1]
    )


def _rows(block: RowBlock) -> tuple[Tensor, Tensor]:
    q = block.q
    if not block.k.shape[1]:
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=_wide(q))
        return unseeing(q), lse
    mask, blind = mask_of(block)
    z, lse = _flash(block, mask=mask)
    if blind is None:
        return z, lse
    return z.masked_fill(blind.transpose(1, 2), 0.0), lse.masked_fill(blind[..., 0], -torch.inf)


def _flash(
    block: RowBlock, is_causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    q, k, v, rule = block[:4]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    assert _FLASH is not None
    z, lse = _FLASH(
        # It reads the last axis as if it were contiguous.
        *((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v)),
        is_causal=is_causal,
        attn_mask=mask,
        scale=1.0 / rule.scale,
    )
    return z.transpose(1, 2), lse.contiguous()


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, q.dtype)


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel("attention_lse", "torch flash in blocks", attention_lse, _refuses, priority=10)
