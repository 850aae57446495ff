"""Rotary embedding on the two halves at once, without building the turned copy of ``x``."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.kernels.kernel import Kernel
from fastlens.kernels.reference import rotary as by_formula


def rotary(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "#batch pos rotary_dim"],
    sin: Float[Tensor, "#batch pos rotary_dim"],
    adjacent_pairs: bool,
) -> Float[Tensor, "batch pos head d_head"]:
    """See `fastlens.ops.rotary.rotary`."""
    if adjacent_pairs:
        return by_formula(x, cos, sin, adjacent_pairs)
    half, d_head = cos.shape[-1] // 2, x.shape[-1]
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    first, second, *passing = x.split(
        [half, half, d_head - 2 * half][: 2 + (d_head > 2 * half)], -1
    )
    return torch.cat(
        [
            torch.addcmul(first * cos, second, sin, value=-1),
            torch.addcmul(second * cos, first, sin),
            *passing,
        ],
        -1,
    )


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel("rotary", "torch rotary by halves", rotary, _refuses, priority=10)
