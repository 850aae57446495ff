"""The specification of `norm`: LayerNorm or RMSNorm with the statistics it divided by."""

import torch
from jaxtyping import Float
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what a norm's statistics are taken and kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm(
    x: Float[Tensor, "... d"],
    w: Float[Tensor, " d"] | None,
    b: Float[Tensor, " d"] | None,
    eps: float,
    centre: bool,
) -> tuple[Float[Tensor, "... d"], Float[Tensor, "*rows_or_none"], Float[Tensor, "... 1"]]:
    """``(x - mean) / scale * w + b``, the mean and ``scale = sqrt(mean((x - mean)^2) + eps)``.

    All in the dtype of the statistics, the output then rounded once to the widest of x, w and b.
    Without ``centre`` the mean is taken as 0, and none is returned: a tensor of no elements.
    """
    dtype = x.dtype
    for factor in (w, b):
        dtype = dtype if factor is None else torch.promote_types(dtype, factor.dtype)
    wide = x.to(statistics_dtype(x.dtype))
    mean = wide.mean(-1, keepdim=True) if centre else wide.new_empty(0)
    centred = wide - mean if centre else wide
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    out = centred / scale
    out = out if w is None else out * w
    out = out if b is None else out + b
    return out.to(dtype), mean, scale
