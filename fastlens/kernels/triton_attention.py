"""Attention fused in Triton. Not run on a GPU."""

import functools

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.kernels import torch_attention
from fastlens.kernels.jit import launch, power_of_two, refusal
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule, alibi_slopes

LARGEST_D_HEAD = 256

# (bytes of an element, BLOCK_D) -> BLOCK_M, BLOCK_N, num_warps, num_stages. None spills registers
# on sm_80, sm_90, sm_100 or gfx942, by triton 3.7.1 or by 3.9.0, with every switch or only causal
# (tests/gpu/test_ahead_of_time.py); none was timed.
BLOCKS = {
    (2, 16): (64, 32, 4, 2),
    (2, 32): (64, 32, 4, 2),
    (2, 64): (64, 64, 8, 2),
    (2, 128): (64, 32, 4, 2),
    (2, 256): (64, 32, 8, 1),
    (4, 16): (64, 16, 4, 2),
    (4, 32): (32, 32, 4, 2),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 16, 8, 2),
    (4, 256): (16, 16, 8, 1),
}
# Where those would spill with a bias.
BLOCKS_WITH_BIAS = {
    (2, 256): (64, 16, 8, 1),
    (4, 128): (16, 16, 4, 1),
    (4, 256): (16, 16, 4, 1),
}


def attention(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """See `fastlens.ops.attention.attention`; no gradient here, the registered op has it."""
    if q.shape[-1] > LARGEST_D_HEAD:
        return torch_attention.attention(q, k, v, rule, offset, key_mask, bias)
    return forward(q, k, v, rule, offset, key_mask, bias)[0]


def forward(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> tuple[Float[Tensor, "batch query_pos head d_head"], Float[Tensor, "batch head query_pos"]]:
    """Attention and the log-sum-exp of its scores, of heads of at most 256 channels."""
    batch, n_queries, n_heads, d_head = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, n_heads, n_queries, dtype=torch.float32, device=q.device)
    block_d = max(16, power_of_two(d_head))
    table = BLOCKS if bias is None else {**BLOCKS, **BLOCKS_WITH_BIAS}
    block_m, block_n, num_warps, num_stages = table[q.element_size(), block_d]
    # One axis: the others of a CUDA grid end at 65535.
    grid = (-(-n_queries // block_m) * batch * n_heads,)
    launch(
        *("attention", "attention_fwd_kernel", grid, q.device),
        *(q, k, v, out, lse),
        *added(q, rule, key_mask, bias),
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride()[:3],
        *added_strides(key_mask, bias),
        n_heads,
        *numbers(q, k, rule, offset),
        **switches(rule, max(k.shape[1], offset + n_queries), key_mask, bias),
        D_HEAD=d_head,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out, lse


def added(
    q: Tensor, rule: AttentionRule, key_mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Key mask, ALiBi's slopes and bias, as the kernels take them."""
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    return mask, slopes(q.shape[2], q.device) if rule.alibi else None, bias


def added_strides(key_mask: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    """Of mask and bias; an axis of one entry is stood on, not walked along."""
    of_mask = (0, 0) if key_mask is None else key_mask.stride()
    if bias is None:
        return *of_mask, 0, 0, 0, 0
    steps = zip(bias.shape, bias.stride(), strict=True)
    return *of_mask, *(0 if length == 1 else stride for length, stride in steps)


def numbers(q: Tensor, k: Tensor, rule: AttentionRule, offset: int) -> tuple[int | float, ...]:
    """What the kernels take after the number of heads, in their order."""
    sizes = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    return *sizes, offset, rule.window or 0, 1.0 / rule.scale, float(rule.soft_cap)


def switches(
    rule: AttentionRule, n_positions: int, key_mask: Tensor | None, bias: Tensor | None
) -> dict[str, bool]:
    """Which parts of the kernels are compiled."""
    return {
        "CAUSAL": rule.causal,
        "WINDOW": rule.window is not None and (rule.window < n_positions or not rule.causal),
        "SOFT_CAP": rule.soft_cap > 0,
        "ALIBI": rule.alibi,
        "KEY_MASK": key_mask is not None,
        "BIAS": bias is not None,
    }


@functools.lru_cache(64)
def slopes(n_heads: int, device: torch.device) -> Float[Tensor, " head"]:
    """ALiBi's, in float32, made once a device."""
    with torch.inference_mode(False):
        return alibi_slopes(n_heads, device, torch.float32)


KERNEL = Kernel("attention", "triton attention", attention, refusal, 20, is_opaque=True)
