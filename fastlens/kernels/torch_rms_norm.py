"""RMSNorm by a vector norm and one product; statistics of 16-bit inputs are taken in float32.

PyTorch's own ``rms_norm`` is put together from smaller ops on CPU and squares the whole input.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.kernels.kernel import Kernel

# The vector norm adds one number after the other: of longer rows the mean, which adds in pairs,
# has a fraction of its error.
LONGEST = 1024


def rms_norm(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "... d"]:
    """See `fastlens.ops.norm.rms_norm`."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if x.shape[-1] <= LONGEST:
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        square = norm.square() / x.shape[-1]
    else:
        square = wide.square().mean(-1, keepdim=True)
    scale = torch.rsqrt(square + eps)
    out = (wide * scale).to(x.dtype)
    return out if w is None else out * w


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel("rms_norm", "vector norm", rms_norm, _refuses, priority=10)
