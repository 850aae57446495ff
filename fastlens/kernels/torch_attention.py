"""Attention over PyTorch's fused `scaled_dot_product_attention`, in blocks of query rows."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule, alibi_slopes, visibility, visible_keys
from fastlens.kernels.reference_attention import attention as materialised

ROWS_PER_BLOCK = 512
# Masks of at most so many entries are kept.
KEPT_ENTRIES = 2**14


class RowBlock(NamedTuple):
    """The arguments of `attention` for some query rows and the keys that any of them sees.

    Positions are relative to the first of those keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rule: AttentionRule
    offset: int
    key_mask: Tensor | None
    bias: Tensor | None


def attention(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """Fused where no mask tensor is needed; else blocks of query rows with their own mask slice."""
    whole = RowBlock(q, k, v, rule, offset, key_mask, bias)
    unmasked = needs_no_mask(whole)
    if unmasked is not None:
        return _sdpa(q, k, v, rule, is_causal=unmasked == "causal")
    blocks = [_rows(block) for block in row_blocks(whole)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def needs_no_mask(whole: RowBlock) -> str | None:
    """``"causal"`` if the only mask is the triangle of a square, ``"all"`` if there is none."""
    q, k, _, rule, offset, key_mask, bias = whole
    n_queries, n_keys = q.shape[1], k.shape[1]
    window_binds = rule.window is not None and max(n_keys, offset + n_queries) > rule.window
    if key_mask is not None or bias is not None or window_binds or rule.alibi or rule.soft_cap > 0:
        return None
    if not rule.causal or n_keys <= offset + 1:
        return "all"
    return "causal" if offset == 0 and n_queries == n_keys else None


def row_blocks(whole: RowBlock) -> Iterator[RowBlock]:
    """At least one block of at most `ROWS_PER_BLOCK` query rows each."""
    q, k, v, rule, offset, key_mask, bias = whole
    for row in range(0, max(1, q.shape[1]), ROWS_PER_BLOCK):
        rows = slice(row, min(q.shape[1], row + ROWS_PER_BLOCK))
        low, high = visible_keys(rule, k.shape[1], offset + row, offset + rows.stop)
        low = min(low, high)
        yield RowBlock(
            q[:, rows],
            k[:, low:high],
            v[:, low:high],
            rule,
            offset + row - low,
            None if key_mask is None else key_mask[:, low:high],
            None if bias is None else bias[:, :, rows, low:high],
        )


def _rows(block: RowBlock) -> Tensor:
    q, k, v, rule = block[:4]
    if not k.shape[1]:
        return unseeing(q)
    if rule.soft_cap > 0:
        # No fused CPU kernel caps scores.
        return materialised(*block) if _is_rare(block) else _capped(block)
    mask, blind = mask_of(block)
    z = _sdpa(q, k, v, rule, mask=mask)
    return z if blind is None else z.masked_fill(blind.transpose(1, 2), 0.0)


def _is_rare(block: RowBlock) -> bool:
    """Whether soft-capped scores need more than their products and a mask."""
    return block.bias is not None or block.rule.alibi or block.q.element_size() == 2


def _capped(block: RowBlock) -> Tensor:
    """Soft-capped attention by two batched products, the heads of a group side by side."""
    q, k, v, rule = block[:4]
    batch, n_queries, n_heads, d_head = q.shape
    n_keys, kv_heads, d_value = v.shape[1:]
    group = n_heads // kv_heads
    rows = q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
    scores = torch.bmm(
        rows.reshape(batch * kv_heads, group * n_queries, d_head),
        k.permute(0, 2, 3, 1).reshape(batch * kv_heads, d_head, n_keys),
    )
    scores = torch.tanh(scores * (1.0 / (rule.scale * rule.soft_cap))) * rule.soft_cap
    visible, blind = mask_of(block)
    if visible is not None:
        scores = scores.view(batch, n_heads, n_queries, n_keys).masked_fill(~visible, -torch.inf)
    pattern = torch.softmax(scores, -1).view(batch * kv_heads, group * n_queries, n_keys)
    z = torch.bmm(pattern, v.permute(0, 2, 1, 3).reshape(batch * kv_heads, n_keys, d_value))
    z = z.view(batch, kv_heads, group, n_queries, d_value).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return z if blind is None else z.masked_fill(blind.transpose(1, 2), 0.0)


def unseeing(q: Tensor) -> Tensor:
    """Zeros for rows that see no key: known to autograd, with a gradient of zero."""
    return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)


def mask_of(block: RowBlock) -> tuple[Tensor | None, Tensor | None]:
    """What is added to scores (or, of booleans, which keys are seen), and which rows see no key.

    A row without keys would be NaN and poison gradients: its mask lets it see all keys. What comes
    out for it, ``[batch, head, query_pos, 1]`` in the second tensor, is to be replaced.
    """
    q, k, _, rule, offset, key_mask, bias = block
    n_queries, n_keys = q.shape[1], k.shape[1]
    is_beyond = rule.window is not None and offset + n_queries - rule.window >= n_keys
    can_be_blind = key_mask is not None or bias is not None or is_beyond
    # Not while tracing, nor for fake tensors: what is kept must be a plain tensor.
    is_plain = type(q) is Tensor and not torch.compiler.is_compiling()
    is_small = n_queries * n_keys <= KEPT_ENTRIES
    if is_plain and is_small and not can_be_blind and not rule.alibi:
        return _kept_mask(rule._replace(scale=1.0), offset, n_queries, n_keys, q.device), None
    queries = torch.arange(offset, offset + n_queries, device=q.device)
    keys = torch.arange(n_keys, device=q.device)
    visible = visibility(rule, queries, keys, key_mask)
    added = None if bias is None else bias.to(_mask_dtype(q))
    if rule.alibi:
        distance = (keys[None, :] - queries[:, None]).clamp(max=0)
        slopes = alibi_slopes(q.shape[2], q.device, _mask_dtype(q))[:, None, None]
        added = (slopes * distance)[None] if added is None else added + slopes * distance
    if added is not None and visible is not None:
        added = added.masked_fill(~visible, -torch.inf)
    blind = None
    if can_be_blind and added is not None:
        blind = (added == -torch.inf).all(-1, keepdim=True)
        added = added.masked_fill(blind, 0.0)
    elif can_be_blind and visible is not None:
        blind = ~visible.any(-1, keepdim=True)
        visible = visible | blind
    return (visible if added is None else added), blind


def _mask_dtype(q: Tensor) -> torch.dtype:
    # Far keys of ALiBi need more digits than 16 bits have; only the CPU takes a wider mask.
    return torch.float32 if q.element_size() == 2 and q.device.type == "cpu" else q.dtype


@functools.lru_cache(256)
def _kept_mask(
    rule: AttentionRule, first: int, n_queries: int, n_keys: int, device: torch.device
) -> Tensor | None:
    """A small mask without padding, made once: a sweep asks for the same ones in every layer."""
    with torch.inference_mode(False):
        queries = torch.arange(first, first + n_queries, device=device)
        return visibility(rule, queries, torch.arange(n_keys, device=device), None)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: AttentionRule,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=1.0 / rule.scale,
        enable_gqa=k.shape[2] != q.shape[2],
    ).transpose(1, 2)


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel("attention", "torch SDPA in blocks", attention, _refuses, priority=10)
