"""RMSNorm by PyTorch's fused kernel; statistics of 16-bit inputs are taken in float32."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlens.kernels.kernel import Kernel


def rms_norm(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "... d"]:
    """See `fastlens.ops.norm.rms_norm`."""
    return F.rms_norm(x, x.shape[-1:], w, eps)


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel("rms_norm", "torch rms_norm", rms_norm, _refuses, priority=10)
