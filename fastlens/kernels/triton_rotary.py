"""Rotary embedding in one pass, in Triton. Not run on a GPU."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.kernels.jit import launch, power_of_two, refusal
from fastlens.kernels.kernel import Kernel

ELEMENTS_PER_PROGRAM = 2048


def rotary(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "#batch pos rotary_dim"],
    sin: Float[Tensor, "#batch pos rotary_dim"],
    adjacent_pairs: bool,
) -> Float[Tensor, "batch pos head d_head"]:
    """See `fastlens.ops.rotary.rotary`. Computed in float32 and rounded once.

    No gradient here: the registered op has it.
    """
    batch, n_pos, n_heads, d_head = x.shape
    rotary_dim = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype))
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    if out.numel() == 0:
        return out
    block_half = power_of_two(rotary_dim // 2)
    block_passing = power_of_two(d_head - rotary_dim)
    block_h = min(power_of_two(n_heads), max(1, ELEMENTS_PER_PROGRAM // power_of_two(d_head)))
    launch(
        *("rotary", "rotary_fwd_kernel", (batch * n_pos, -(-n_heads // block_h)), x.device),
        *(x, cos, sin, out),
        *x.stride(),
        *cos.stride(),
        *sin.stride(),
        *(n_pos, n_heads, d_head, rotary_dim // 2),
        ADJACENT=adjacent_pairs,
        PASSING=d_head > rotary_dim,
        BLOCK_H=block_h,
        BLOCK_HALF=block_half,
        BLOCK_PASSING=block_passing,
        num_warps=4,
    )
    return out


KERNEL = Kernel("rotary", "triton rotary", rotary, refusal, priority=20, is_opaque=True)
