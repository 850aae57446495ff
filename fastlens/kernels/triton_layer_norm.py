"""LayerNorm in one pass over the rows, in Triton (`triton_norm`). Not run on a GPU."""

from jaxtyping import Float
from torch import Tensor

from fastlens.kernels.jit import refusal
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.triton_norm import norm


def layer_norm(
    x: Float[Tensor, "... d"],
    w: Float[Tensor, " d"] | None,
    b: Float[Tensor, " d"] | None,
    eps: float,
) -> Float[Tensor, "... d"]:
    """See `fastlens.ops.norm.layer_norm`; no gradient here, the registered op has it."""
    return norm(x, w, b, eps, True)[0]


def layer_norm_with_scale(
    x: Float[Tensor, "... d"],
    w: Float[Tensor, " d"] | None,
    b: Float[Tensor, " d"] | None,
    eps: float,
) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
    """`layer_norm` and the ``sqrt(var + eps)`` it divided by."""
    out, _, scale = norm(x, w, b, eps, True)
    return out, scale


def rms_norm_with_scale(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None, eps: float
) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
    """RMSNorm and the ``sqrt(mean(x^2) + eps)`` it divided by."""
    out, _, scale = norm(x, w, None, eps, False)
    return out, scale


KERNEL = Kernel("layer_norm", "triton layer_norm", layer_norm, refusal, 20, is_opaque=True)
