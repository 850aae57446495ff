"""LayerNorm and RMSNorm, with or without gain and bias."""

from jaxtyping import Float
from torch import Tensor

from fastlens.ops.dispatch import kernel_for


def layer_norm(
    x: Float[Tensor, "... d"],
    w: Float[Tensor, " d"] | None = None,
    b: Float[Tensor, " d"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "... d"]:
    """Layer normalisation over the last axis (Ba et al. 1607.06450).

    ``(x - mean(x)) / sqrt(var(x) + eps) * w + b``, with the biased variance.

    Args:
        x: Residual stream.
        w, b: Gain and bias; None leaves them out (weights folded into the next layer).
        eps: Added to the variance, in units of x squared.

    Numerics: statistics in float32 for 16-bit inputs. Differentiable in x, w and b.
    """
    return kernel_for("layer_norm", x.device.type, x.dtype)(x, w, b, eps)


def rms_norm(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None = None, eps: float = 1e-5
) -> Float[Tensor, "... d"]:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 1910.07467).

    ``x / sqrt(mean(x^2) + eps) * w``. Arguments and numerics as `layer_norm`.
    """
    return kernel_for("rms_norm", x.device.type, x.dtype)(x, w, eps)
