"""LayerNorm and RMSNorm, with or without gain and bias, and the scale they divided by."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.kernels.reference_norm import statistics_dtype
from fastlens.ops.dispatch import is_opaque, kernel_for


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
    device = x.device.type
    # No kernel for the CPU is opaque, and there every call counts.
    if device != "cpu" and is_opaque("layer_norm", device, x.dtype):
        return torch.ops.fastlens.norm(x, w, b, eps, True)[0]
    return kernel_for("layer_norm", device, x.dtype)(x, w, b, eps)


def rms_norm(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None = None, eps: float = 1e-5
) -> Float[Tensor, "... d"]:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 1910.07467).

    ``x / sqrt(mean(x^2) + eps) * w``. Arguments and numerics as `layer_norm`.
    """
    device = x.device.type
    if device != "cpu" and is_opaque("rms_norm", device, x.dtype):
        return torch.ops.fastlens.norm(x, w, None, eps, False)[0]
    return kernel_for("rms_norm", device, x.dtype)(x, w, eps)


def layer_norm_with_scale(
    x: Float[Tensor, "... d"],
    w: Float[Tensor, " d"] | None = None,
    b: Float[Tensor, " d"] | None = None,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
    """`layer_norm`, and the number it divided each row by.

    Args:
        x, w, b, eps: As in `layer_norm`.

    Returns:
        The normalised rows, and ``scale = sqrt(var(x) + eps)``, before the gain, in units of x:
        what TransformerLens' ``hook_scale`` holds. A direction in the residual stream divided by
        it is that direction's share of the norm's output (the norm being held fixed).

    Numerics: computed in float32 (float64 for float64) and rounded once, the scale not at all: it
    is float32 for 16-bit inputs. If x, w and b differ in dtype, the output has the widest.
    Differentiable in x, w and b, by the scale too.
    Cost: on CUDA with Triton on, that of `layer_norm`, which keeps the scale in any case; else a
    few passes over x.
    """
    out, _, scale = _norm(x, w, b, eps, True)
    return out, scale


def rms_norm_with_scale(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None = None, eps: float = 1e-5
) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
    """`rms_norm`, and the number it divided each row by: ``scale = sqrt(mean(x^2) + eps)``.

    Arguments, numerics and cost as `layer_norm_with_scale`.
    """
    out, _, scale = _norm(x, w, None, eps, False)
    return out, scale


def _norm(
    x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, centre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    device = x.device.type
    if is_opaque("norm", device, x.dtype):
        return torch.ops.fastlens.norm(x, w, b, eps, centre)
    return kernel_for("norm", device, x.dtype)(x, w, b, eps, centre)


# -- the op that compilers see ---------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastlens", "FRAGMENT")
# Without `centre` there is no mean: it has no elements.
_LIBRARY.define(
    "norm(Tensor x, Tensor? w, Tensor? b, float eps, bool centre) "
    "-> (Tensor out, Tensor mean, Tensor scale)"
)


def _run(
    x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, centre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = kernel_for("norm", x.device.type, x.dtype)
    out, mean, scale = kernel(x, w, b, eps, centre)
    return out.contiguous(), mean.contiguous(), scale.contiguous()


def _fake(
    x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, centre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype
    for factor in (w, b):
        dtype = dtype if factor is None else torch.promote_types(dtype, factor.dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=statistics_dtype(x.dtype))
    mean = torch.empty_like(scale) if centre else scale.new_empty(0)
    return x.new_empty(x.shape, dtype=dtype), mean, scale


def _setup_context(ctx, inputs, output) -> None:
    x, w, b, _, centre = inputs
    _, mean, scale = output
    ctx.save_for_backward(x, w, mean if centre else None, scale)
    ctx.b_dtype = None if b is None else b.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, to_out: Tensor | None, to_mean: Tensor | None, to_scale: Tensor | None):
    """In the dtype of the statistics, from the kept ones; itself differentiable."""
    x, w, mean, scale = ctx.saved_tensors
    normalized = (x.to(scale.dtype) if mean is None else x.to(scale.dtype) - mean) / scale
    to_x = torch.zeros_like(normalized)
    to_w = to_b = None
    if to_out is not None:
        to_out = to_out.to(scale.dtype)
        leading = tuple(range(x.dim() - 1))
        if w is not None and ctx.needs_input_grad[1]:
            to_w = (to_out * normalized).sum(leading).to(w.dtype)
        if ctx.b_dtype is not None and ctx.needs_input_grad[2]:
            to_b = to_out.sum(leading).to(ctx.b_dtype)
        inward = to_out if w is None else to_out * w.to(scale.dtype)
        to_x = inward - normalized * (inward * normalized).mean(-1, keepdim=True)
        if mean is not None:
            to_x = to_x - inward.mean(-1, keepdim=True)
        to_x = to_x / scale
    if to_scale is not None:
        to_x = to_x + to_scale * normalized / x.shape[-1]
    if to_mean is not None and mean is not None:
        to_x = to_x + to_mean / x.shape[-1]
    return to_x.to(x.dtype), to_w, to_b, None, None


_LIBRARY.impl("norm", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastlens::norm", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "fastlens::norm", _backward, setup_context=_setup_context, lib=_LIBRARY
)
