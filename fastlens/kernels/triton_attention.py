"""Attention fused in Triton, with its log-sum-exp, and rows of its pattern. Not run on a GPU.

The gradient is recomputed in blocks of query rows by PyTorch.
"""

import functools
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.errors import FastlensError
from fastlens.kernels import reference, torch_attention
from fastlens.kernels.jit import launch, power_of_two, refusal
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule, alibi_slopes, visible_keys

LARGEST_D_HEAD = 256
ROWS_PER_BLOCK = 512

# (bytes of an element, BLOCK_D) -> BLOCK_M, BLOCK_N, num_warps, num_stages. None spills registers
# on sm_80, sm_90, sm_100 or gfx942 (tests/gpu/test_ahead_of_time.py); none was timed.
BLOCKS = {
    (2, 16): (64, 32, 4, 2),
    (2, 32): (64, 64, 4, 2),
    (2, 64): (64, 64, 4, 2),
    (2, 128): (64, 32, 4, 2),
    (2, 256): (64, 32, 8, 1),
    (4, 16): (64, 32, 4, 2),
    (4, 32): (64, 32, 4, 2),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 16, 8, 1),
    (4, 256): (16, 16, 8, 1),
}
PATTERN_BLOCK = 4096  # elements of K a program of `pattern_rows` holds


def attention(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """See `fastlens.ops.attention.attention`."""
    if q.shape[-1] > LARGEST_D_HEAD:
        return torch_attention.attention(q, k, v, rule, offset, key_mask)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, rule, offset, key_mask)
    return _forward(q, k, v, rule, offset, key_mask)[0]


def attention_with_lse(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
) -> tuple[Float[Tensor, "batch query_pos head d_head"], Float[Tensor, "batch head query_pos"]]:
    """`attention` and the log-sum-exp of each row's scores, in nats and float32.

    A row that sees no key has zeros and minus infinity. Not differentiable.

    Raises:
        FastlensError: A gradient would be lost, or heads are larger than 256.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise FastlensError(
            "attention_with_lse has no gradient, and q, k or v asks for one: detach them, or call "
            "attention"
        )
    if q.shape[-1] > LARGEST_D_HEAD:
        raise FastlensError(
            f"attention_with_lse on heads of size {q.shape[-1]}: the Triton kernel takes at most "
            f"{LARGEST_D_HEAD}"
        )
    return _forward(q, k, v, rule, offset, key_mask)


def pattern_rows(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    lse: Float[Tensor, "batch head query_pos"],
    sites: Int[Tensor, "site 3"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    *,
    scores: bool = False,
) -> Float[Tensor, "site key_pos"]:
    """Rows of the attention pattern (or the scores before the softmax), and no other.

    ``exp(scores - lse)``: nothing of size ``query_pos x key_pos`` is held.

    Args:
        lse: Of these queries and keys, from `attention_with_lse`.
        sites: (example, head, query row) of each row wanted, int64. On a GPU they are not checked
            (that would wait for the device); on the CPU one out of range is an error.

    Numerics: products and sums in float32; float32 comes back. Not differentiable.
    """
    if sites.dtype != torch.int64:
        raise FastlensError(f"sites are {sites.dtype}: give int64")
    n_keys, n_heads, d_head = k.shape[1], q.shape[2], q.shape[3]
    if sites.device.type == "cpu" and len(sites):
        limit = torch.tensor([q.shape[0], n_heads, q.shape[1]])
        if bool(((sites < 0) | (sites >= limit)).any()):
            raise FastlensError(f"a site is outside (example, head, query row) < {limit.tolist()}")
    out = torch.empty(len(sites), n_keys, dtype=torch.float32, device=q.device)
    block_d = power_of_two(d_head)
    block_n = min(128, max(1, PATTERN_BLOCK // block_d))
    grid = (len(sites), -(-n_keys // block_n))
    tensors = (q, k, lse.contiguous(), sites.contiguous(), out)
    launch(
        *("attention", "pattern_rows_kernel", grid, q.device),
        *tensors,
        *_mask_and_slopes(q, rule, key_mask),
        *q.stride(),
        *k.stride(),
        *_mask_strides(key_mask),
        *_numbers(q, k, rule, offset),
        **_switches(rule, max(n_keys, offset + q.shape[1]), key_mask),
        SCORES=scores,
        D_HEAD=d_head,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, offset: int, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, n_queries, n_heads, d_head = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, n_heads, n_queries, dtype=torch.float32, device=q.device)
    block_d = max(16, power_of_two(d_head))
    block_m, block_n, num_warps, num_stages = BLOCKS[q.element_size(), block_d]
    # One axis: the others of a CUDA grid end at 65535.
    grid = (-(-n_queries // block_m) * batch * n_heads,)
    launch(
        *("attention", "attention_fwd_kernel", grid, q.device),
        *(q, k, v, out, lse),
        *_mask_and_slopes(q, rule, key_mask),
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride()[:3],
        *_mask_strides(key_mask),
        *_numbers(q, k, rule, offset),
        **_switches(rule, max(k.shape[1], offset + n_queries), key_mask),
        D_HEAD=d_head,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out, lse


def _mask_and_slopes(
    q: Tensor, rule: AttentionRule, key_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    return mask, _slopes(q.shape[2], q.device) if rule.alibi else None


@functools.lru_cache(64)
def _slopes(n_heads: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return alibi_slopes(n_heads, device, torch.float32)


def _mask_strides(key_mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if key_mask is None else key_mask.stride()


def _numbers(q: Tensor, k: Tensor, rule: AttentionRule, offset: int) -> tuple[int | float, ...]:
    """What both kernels take after the strides, in their order."""
    group_size = q.shape[2] // k.shape[2]
    sizes = (q.shape[2], group_size, q.shape[1], k.shape[1])
    return *sizes, offset, rule.window or 0, 1.0 / rule.scale, float(rule.soft_cap)


def _switches(rule: AttentionRule, n_positions: int, key_mask: Tensor | None) -> dict[str, bool]:
    return {
        "CAUSAL": rule.causal,
        "WINDOW": rule.window is not None and (rule.window < n_positions or not rule.causal),
        "SOFT_CAP": rule.soft_cap > 0,
        "ALIBI": rule.alibi,
        "KEY_MASK": key_mask is not None,
    }


class _Attention(torch.autograd.Function):
    """Forward in Triton; the backward builds each block of query rows again, in float32."""

    @staticmethod
    def forward(ctx: Any, q, k, v, rule, offset, key_mask):  # type: ignore[override]
        ctx.save_for_backward(q, k, v, key_mask)
        ctx.rule, ctx.offset = rule, offset
        return _forward(q, k, v, rule, offset, key_mask)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_z: Tensor):  # type: ignore[override]
        q, k, v, key_mask = ctx.saved_tensors
        return *_gradients(q, k, v, ctx.rule, ctx.offset, key_mask, grad_z), None, None, None


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: AttentionRule,
    offset: int,
    key_mask: Tensor | None,
    grad_z: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sum of ``z * grad_z``, one block of query rows at a time."""
    grad_q = torch.empty_like(q)
    grad_k = torch.zeros_like(k, dtype=torch.float32)
    grad_v = torch.zeros_like(v, dtype=torch.float32)
    for row in range(0, q.shape[1], ROWS_PER_BLOCK):
        rows = slice(row, row + ROWS_PER_BLOCK)
        first = offset + row
        # Positions are relative: the keys that no row here sees are cut off.
        low, high = visible_keys(rule, k.shape[1], first, first + q[:, rows].shape[1])
        keys = slice(min(low, high), high)
        mask = None if key_mask is None else key_mask[:, keys]
        leaves = [x.detach().float().requires_grad_() for x in (q[:, rows], k[:, keys], v[:, keys])]
        with torch.enable_grad():
            z = _blind_rows_zeroed(leaves, rule, first - keys.start, mask)
            grads = torch.autograd.grad(z, leaves, grad_z[:, rows].float())
        grad_q[:, rows] = grads[0]
        grad_k[:, keys] += grads[1]
        grad_v[:, keys] += grads[2]
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _blind_rows_zeroed(
    leaves: list[Tensor], rule: AttentionRule, offset: int, key_mask: Tensor | None
) -> Tensor:
    """`reference.attention` whose gradient is zero, not NaN, for a row that sees no key."""
    q, k, v = leaves
    scores = reference.attention_scores(q, k, rule, offset, key_mask)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    pattern = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return reference.attention_with_pattern(pattern, v)


KERNEL = Kernel("attention", "triton attention", attention, refusal, priority=20)
