"""RMSNorm in one pass over the rows, in Triton (`triton_norm`). Not run on a GPU."""

from jaxtyping import Float
from torch import Tensor

from fastlens.kernels.jit import refusal
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.triton_norm import norm


def rms_norm(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "... d"]:
    """See `fastlens.ops.norm.rms_norm`; no gradient here, the registered op has it."""
    return norm(x, w, None, eps, False)[0]


KERNEL = Kernel("rms_norm", "triton rms_norm", rms_norm, refusal, priority=20, is_opaque=True)
