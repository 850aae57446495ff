"""LayerNorm and RMSNorm with their statistics, in one pass over the rows. Not run on a GPU."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.kernels import reference_norm
from fastlens.kernels.jit import launch, power_of_two, refusal
from fastlens.kernels.kernel import Kernel

ELEMENTS_PER_PROGRAM = 4096
# A row stands in registers: longer ones would spill.
LARGEST_ROW = 2**14


def norm(
    x: Float[Tensor, "... d"],
    w: Float[Tensor, " d"] | None,
    b: Float[Tensor, " d"] | None,
    eps: float,
    centre: bool,
) -> tuple[Float[Tensor, "... d"], Float[Tensor, "*rows_or_none"], Float[Tensor, "... 1"]]:
    """See `fastlens.kernels.reference_norm.norm`, which takes rows of more than 16,384 channels."""
    d = x.shape[-1]
    if d > LARGEST_ROW:
        return reference_norm.norm(x, w, b, eps, centre)
    rows = x.reshape(-1, d)
    dtype = x.dtype
    for factor in (w, b):
        dtype = dtype if factor is None else torch.promote_types(dtype, factor.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(scale) if centre else scale.new_empty(0)
    if out.numel() == 0:
        # No row, or rows of no channels: nothing to divide, and the statistics are those of 0 / 0.
        return out, mean.fill_(torch.nan), scale.fill_(torch.nan)
    block_d = power_of_two(d)
    block_rows = max(1, min(16, ELEMENTS_PER_PROGRAM // block_d))
    launch(
        *("norm", "norm_fwd_kernel", (-(-len(rows) // block_rows),), x.device),
        *(rows, w, b, out, mean if centre else None, scale),
        *rows.stride(),
        0 if w is None else w.stride(0),
        0 if b is None else b.stride(0),
        *(len(rows), d, float(eps)),
        CENTRE=centre,
        GAIN=w is not None,
        BIAS=b is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=4 if block_d <= ELEMENTS_PER_PROGRAM else 16,
    )
    return out, mean, scale


KERNEL = Kernel("norm", "triton norm", norm, refusal, priority=20, is_opaque=True)
