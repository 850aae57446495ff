"""LayerNorm in one pass over the rows, in Triton. Not run on a GPU."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.errors import FastlensError
from fastlens.kernels import torch_layer_norm
from fastlens.kernels.jit import launch, power_of_two, refusal
from fastlens.kernels.kernel import Kernel

ELEMENTS_PER_PROGRAM = 4096
# A row stands in registers: longer ones would spill.
LARGEST_ROW = 2**14


def layer_norm(
    x: Float[Tensor, "... d"],
    w: Float[Tensor, " d"] | None,
    b: Float[Tensor, " d"] | None,
    eps: float,
) -> Float[Tensor, "... d"]:
    """See `fastlens.ops.norm.layer_norm`. Rows of more than 16,384 channels are PyTorch's."""
    if x.shape[-1] > LARGEST_ROW:
        return torch_layer_norm.layer_norm(x, w, b, eps)
    return layer_norm_with_scale(x, w, b, eps)[0]


def layer_norm_with_scale(
    x: Float[Tensor, "... d"],
    w: Float[Tensor, " d"] | None,
    b: Float[Tensor, " d"] | None,
    eps: float,
) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
    """`layer_norm` and the ``sqrt(var + eps)`` it divided by, in float32.

    Differentiable in x, w and b by the output; the scale carries no gradient.

    Raises:
        FastlensError: More than 16,384 channels.
    """
    return _Norm.apply(x, w, b, eps, True)


def rms_norm_with_scale(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None, eps: float
) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
    """The same without centring: see `fastlens.kernels.triton_rms_norm`."""
    return _Norm.apply(x, w, None, eps, False)


def _forward(
    x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, centre: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output, mean and scale; the statistics are one number a row, in float32."""
    d = x.shape[-1]
    rows = x.reshape(-1, d)
    dtype = x.dtype
    for factor in (w, b):
        dtype = dtype if factor is None else torch.promote_types(dtype, factor.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(scale) if centre else None
    block_d = power_of_two(d)
    block_rows = max(1, min(16, ELEMENTS_PER_PROGRAM // block_d))
    launch(
        *("norm", "norm_fwd_kernel", (-(-len(rows) // block_rows),), x.device),
        *(rows, w, b, out, mean, scale),
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


class _Norm(torch.autograd.Function):
    """Forward in Triton; the backward in PyTorch, in float32, from the kept mean and scale."""

    @staticmethod
    def forward(ctx: Any, x, w, b, eps, centre):  # type: ignore[override]
        if x.shape[-1] > LARGEST_ROW:
            raise FastlensError(
                f"a norm with its scale over {x.shape[-1]} channels: the Triton kernel holds a row "
                f"in registers, at most {LARGEST_ROW}. Call the norm without scale"
            )
        out, mean, scale = _forward(x, w, b, eps, centre)
        ctx.save_for_backward(x, w, b, mean, scale)
        ctx.mark_non_differentiable(scale)
        return out, scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor):  # type: ignore[override]
        x, w, b, mean, scale = ctx.saved_tensors
        wide = x.float() if mean is None else x.float() - mean
        normalized = wide / scale
        grad_out = grad_out.float()
        leading = tuple(range(x.dim() - 1))
        grad_w = None if w is None else (grad_out * normalized).sum(leading).to(w.dtype)
        grad_b = None if b is None else grad_out.sum(leading).to(b.dtype)
        grad = grad_out if w is None else grad_out * w.float()
        inward = grad - normalized * (grad * normalized).mean(-1, keepdim=True)
        if mean is not None:
            inward = inward - grad.mean(-1, keepdim=True)
        return (inward / scale).to(x.dtype), grad_w, grad_b, None, None


KERNEL = Kernel("layer_norm", "triton layer_norm", layer_norm, refusal, priority=20)
