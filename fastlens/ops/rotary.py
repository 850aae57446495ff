"""Rotary position embedding."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.errors import FastlensError
from fastlens.ops.dispatch import is_opaque, kernel_for


def rotary(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "#batch pos rotary_dim"],
    sin: Float[Tensor, "#batch pos rotary_dim"],
    adjacent_pairs: bool = False,
) -> Float[Tensor, "batch pos head d_head"]:
    """Turn pairs of channels by an angle that grows with the position (Su et al. 2104.09864).

    Args:
        x: Queries or keys. Channels beyond ``rotary_dim`` pass unchanged.
        cos, sin: Rows of the tables for these positions; both halves of ``rotary_dim`` (or both
            members of a pair) hold the same angle.
        adjacent_pairs: Pairs are channels (0, 1), (2, 3) ... as in GPT-J; otherwise (0, d/2),
            (1, d/2 + 1) ... as in GPT-NeoX and Llama.

    Numerics: in the dtype of x; in float32, rounded once, where a Triton kernel runs it.
    Differentiable in x.
    Raises: FastlensError where a Triton kernel runs it and a table requires a gradient.
    """
    device = x.device.type
    # No kernel for the CPU is opaque, and there every call counts.
    if device != "cpu" and is_opaque("rotary", device, x.dtype):
        return torch.ops.fastlens.rotary(x, cos, sin, adjacent_pairs)
    return kernel_for("rotary", device, x.dtype)(x, cos, sin, adjacent_pairs)


# -- the op that compilers see ---------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastlens", "FRAGMENT")
_LIBRARY.define("rotary(Tensor x, Tensor cos, Tensor sin, bool adjacent_pairs) -> Tensor")


def _run(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool) -> Tensor:
    return kernel_for("rotary", x.device.type, x.dtype)(x, cos, sin, adjacent_pairs).contiguous()


def _fake(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype))
    return x.new_empty(x.shape, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, cos, sin, adjacent_pairs = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise FastlensError("rotary has no gradient in cos and sin here: detach the tables.")
    ctx.save_for_backward(cos, sin)
    ctx.adjacent_pairs, ctx.dtype = adjacent_pairs, x.dtype


def _backward(ctx, grad: Tensor):
    """The same turn backwards: both members of a pair turn by one angle."""
    cos, sin = ctx.saved_tensors
    turned = torch.ops.fastlens.rotary(grad, cos, -sin, ctx.adjacent_pairs)
    return turned.to(ctx.dtype), None, None, None


_LIBRARY.impl("rotary", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastlens::rotary", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "fastlens::rotary", _backward, setup_context=_setup_context, lib=_LIBRARY
)
