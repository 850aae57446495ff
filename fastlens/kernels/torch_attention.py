"""Attention over PyTorch's fused `scaled_dot_product_attention`, in blocks of query rows."""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule, alibi_slopes, visibility, visible_keys
from fastlens.kernels.reference import attention as materialised

ROWS_PER_BLOCK = 512
# Masks of at most so many entries are kept.
KEPT_ENTRIES = 2**14


def attention(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """Fused where no mask tensor is needed; else blocks of query rows with their own mask slice."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    sees_everything = not rule.causal or (n_queries == 1 and n_keys == offset + 1)
    window_binds = rule.window is not None and n_keys > rule.window
    plain = key_mask is None and not window_binds and not rule.alibi and rule.soft_cap <= 0
    if plain and (sees_everything or (offset == 0 and n_queries == n_keys)):
        return _sdpa(q, k, v, rule, is_causal=not sees_everything)
    blocks = [
        _rows(q[:, row : row + ROWS_PER_BLOCK], k, v, rule, offset + row, key_mask)
        for row in range(0, n_queries, ROWS_PER_BLOCK)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, first: int, key_mask: Tensor | None
) -> Tensor:
    """One block of query rows, whose first stands at absolute position ``first``."""
    low, high = visible_keys(rule, k.shape[1], first, first + q.shape[1])
    k, v = k[:, low:high], v[:, low:high]
    key_mask = None if key_mask is None else key_mask[:, low:high]
    if rule.soft_cap > 0:
        # No fused CPU kernel caps scores. Positions are relative: shift by the keys cut off.
        return materialised(q, k, v, rule, first - low, key_mask)
    # Not while tracing, nor for fake tensors: what is kept must be a plain tensor.
    is_plain = type(q) is Tensor and not torch.compiler.is_compiling()
    is_small = q.shape[1] * (high - low) <= KEPT_ENTRIES
    if is_plain and is_small and key_mask is None and not rule.alibi:
        mask = _kept_mask(rule._replace(scale=1.0), first - low, q.shape[1], high - low, q.device)
        return _sdpa(q, k, v, rule, mask=mask)
    queries = torch.arange(first, first + q.shape[1], device=q.device)
    keys = torch.arange(low, high, device=q.device)
    visible = visibility(rule, queries, keys, key_mask)
    blind = None
    if visible is not None and key_mask is not None:
        blind = ~visible.any(-1, keepdim=True)  # [batch, 1, query_pos, 1]
        # A row without keys would be NaN and poison gradients: let it see all, then zero it.
        visible = visible | blind
    mask = visible
    if rule.alibi:
        distance = (keys[None, :] - queries[:, None]).clamp(max=0)
        mask = alibi_slopes(q.shape[2], q.device, q.dtype)[:, None, None] * distance
        mask = mask[None] if visible is None else mask[None].masked_fill(~visible, -torch.inf)
    z = _sdpa(q, k, v, rule, mask=mask)
    return z if blind is None else z.masked_fill(blind.transpose(1, 2), 0.0)


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
