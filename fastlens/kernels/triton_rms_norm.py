"""RMSNorm in one pass over the rows, in Triton. Not run on a GPU."""

from jaxtyping import Float
from torch import Tensor

from fastlens.kernels import torch_rms_norm
from fastlens.kernels.jit import refusal
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.triton_layer_norm import LARGEST_ROW, rms_norm_with_scale


def rms_norm(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "... d"]:
    """See `fastlens.ops.norm.rms_norm`. Rows of more than 16,384 channels are PyTorch's."""
    if x.shape[-1] > LARGEST_ROW:
        return torch_rms_norm.rms_norm(x, w, eps)
    return rms_norm_with_scale(x, w, eps)[0]


KERNEL = Kernel("rms_norm", "triton rms_norm", rms_norm, refusal, priority=20)
