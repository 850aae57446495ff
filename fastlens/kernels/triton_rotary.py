"""Rotary embedding in one pass, in Triton. Not run on a GPU."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.errors import FastlensError
from fastlens.kernels.jit import launch, power_of_two, refusal
from fastlens.kernels.kernel import Kernel

ELEMENTS_PER_PROGRAM = 2048


def rotary(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "#batch pos rotary_dim"],
    sin: Float[Tensor, "#batch pos rotary_dim"],
    adjacent_pairs: bool,
) -> Float[Tensor, "batch pos head d_head"]:
    """See `fastlens.ops.rotary.rotary`. Computed in float32 and rounded once."""
    return _Rotary.apply(x, cos, sin, adjacent_pairs)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool, sign: float) -> Tensor:
    """By the angle times ``sign``."""
    batch, n_pos, n_heads, d_head = x.shape
    rotary_dim = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype))
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    block_half = power_of_two(rotary_dim // 2)
    block_passing = power_of_two(d_head - rotary_dim)
    block_h = min(power_of_two(n_heads), max(1, ELEMENTS_PER_PROGRAM // power_of_two(d_head)))
    launch(
        *("rotary", "rotary_fwd_kernel", (batch * n_pos, -(-n_heads // block_h)), x.device),
        *(x, cos, sin, out),
        *x.stride(),
        *cos.stride(),
        *sin.stride(),
        *(n_pos, n_heads, d_head, rotary_dim // 2, sign),
        ADJACENT=adjacent_pairs,
        PASSING=d_head > rotary_dim,
        BLOCK_H=block_h,
        BLOCK_HALF=block_half,
        BLOCK_PASSING=block_passing,
        num_warps=4,
    )
    return out


class _Rotary(torch.autograd.Function):
    """The gradient is the same turn backwards: both members of a pair turn by one angle."""

    @staticmethod
    def forward(ctx: Any, x, cos, sin, adjacent_pairs):  # type: ignore[override]
        if cos.requires_grad or sin.requires_grad:
            raise FastlensError("rotary has no gradient in cos and sin: detach the tables")
        ctx.save_for_backward(cos, sin)
        ctx.adjacent_pairs, ctx.dtype = adjacent_pairs, x.dtype
        return _turn(x, cos, sin, adjacent_pairs, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, ctx.adjacent_pairs, -1.0).to(ctx.dtype), None, None, None


KERNEL = Kernel("rotary", "triton rotary", rotary, refusal, priority=20)
