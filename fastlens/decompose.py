"""Algebra of the residual stream: who wrote what, and what a norm or a direction makes of it.

Pure functions over tensors; no model. `ActivationCache` finds the tensors and calls these. A
*stack* has one row per component of the stream: ``[component, *batch_pos, d_model]``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.errors import ShapeError


def head_results(
    z: Float[Tensor, "*batch_pos head d_head"], W_O: Float[Tensor, "head d_head d_out"]
) -> Float[Tensor, "head *batch_pos d_out"]:
    """What each head writes: ``z[h] @ W_O[h]``, as rows of a stack.

    One batched product over the heads; nothing larger than the result is built. Give
    ``W_O @ directions`` instead of ``W_O`` to read the heads along directions, without ``d_model``.
    """
    *batch_pos, heads, d_head = z.shape
    by_head = z.movedim(-2, 0).reshape(heads, -1, d_head)
    return torch.bmm(by_head, W_O).reshape(heads, *batch_pos, W_O.shape[-1])


def neuron_results(
    post: Float[Tensor, "*batch_pos neuron"], W_out: Float[Tensor, "neuron d_out"]
) -> Float[Tensor, "neuron *batch_pos d_out"]:
    """What each neuron writes: its activation times its row of ``W_out``, as rows of a stack."""
    by_neuron = post.movedim(-1, 0).unsqueeze(-1)
    rows = W_out.reshape(W_out.shape[0], *[1] * (post.ndim - 1), W_out.shape[1])
    return by_neuron * rows


def remainder(
    total: Float[Tensor, "*batch_pos d_out"], stacks: list[Float[Tensor, "_ *batch_pos d_out"]]
) -> Float[Tensor, "*batch_pos d_out"]:
    """What of ``total`` the rows of all stacks leave unexplained."""
    for stack in stacks:
        total = total - stack.sum(dim=0)
    return total


def dot(
    stack: Float[Tensor, "component *batch_pos d_model"],
    directions: Float[Tensor, "*some_batch_pos d_model"],
) -> Float[Tensor, "component ..."]:
    """Dot product of every row with a direction: one for all places, or one a place.

    ``directions`` broadcasts against the places from the right. Matrix-vector products: no
    temporary of the stack's size, unless the stack is 16-bit (summed in float32, and so answered).

    Raises: ShapeError if the places of the directions do not broadcast to those of the stack.
    """
    places, theirs = stack.shape[1:-1], directions.shape[:-1]
    fits = len(theirs) <= len(places) and all(
        n in (1, m) for n, m in zip(reversed(theirs), reversed(places), strict=False)
    )
    if not fits:
        raise ShapeError(
            f"directions for {tuple(theirs)} places do not fit a stack with {tuple(places)} "
            "places (batch and position). Give one token, or tokens of shape [batch, pos]; for one "
            "token a prompt at all positions, [batch, 1]."
        )
    dtype = _at_least_32_bits(torch.promote_types(stack.dtype, directions.dtype))
    stack, directions = stack.to(dtype), directions.to(dtype)
    if directions.ndim == 1:
        return stack @ directions
    return (stack.movedim(0, -2) @ directions.unsqueeze(-1)).squeeze(-1).movedim(-1, 0)


# How many elements of a stack are centred or upcast at a time: a few MiB, so the cache keeps them.
_ELEMENTS_AT_ONCE = 2**20


@dataclass(frozen=True)
class FrozenNorm:
    """A LayerNorm or RMSNorm held at the scale that a run had, which makes it linear.

    ``x -> (x - mean(x)) / scale * gain``, without the mean where not ``centred``. Components of the
    residual stream may pass one by one and still sum to what the whole stream became; ``bias``
    belongs to none of them. Without a scale it is the identity.

    Args:
        scale: What the run divided by (units of x), one for every place.
        centred: LayerNorm, not RMSNorm.
        gain, bias: The norm's own, where they are not folded into the next weights.
    """

    scale: Float[Tensor, "*batch_pos 1"] | None = None
    centred: bool = False
    gain: Float[Tensor, " d_model"] | None = None
    bias: Float[Tensor, " d_model"] | None = None

    def apply(self, rows: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*out d_model"]:
        """The rows after the norm."""
        if self.centred:
            rows = rows - rows.mean(dim=-1, keepdim=True)
        rows = self.divide(rows)
        return rows if self.gain is None else rows * self.gain

    def divide(self, rows: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*out d_out"]:
        """The rows over the scale: the part of the norm that cannot move into directions."""
        return rows if self.scale is None else rows / self.scale

    def pull_back(
        self, directions: Float[Tensor, "*places d_model"]
    ) -> Float[Tensor, "*places d_model"]:
        """The directions as seen before the norm.

        ``apply(x) . d == divide(x . pull_back(d))``: centring is symmetric, so it may be done to
        the direction, once, instead of to every row. For weights, whose rows have small means.
        """
        if self.gain is not None:
            directions = directions * self.gain
        if self.centred:
            directions = directions - directions.mean(dim=-1, keepdim=True)
        return directions

    def dot(
        self,
        stack: Float[Tensor, "component *batch_pos d_model"],
        directions: Float[Tensor, "*some_batch_pos d_model"],
    ) -> Float[Tensor, "component ..."]:
        """``apply(stack) . directions``, without building ``apply(stack)``.

        In float32 at least, and answered in the dtype that the plain formula would have. Rows are
        centred a few at a time: to centre the direction instead would cost digits where a row's
        mean is large, as it may be in a model whose weights were not centred.
        """
        if self.gain is not None:
            directions = directions * self.gain
        parts = []
        for part in stack.split(max(1, _ELEMENTS_AT_ONCE // max(1, stack[:1].numel()))):
            part = part.to(_at_least_32_bits(part.dtype))
            if self.centred:
                part = part - part.mean(dim=-1, keepdim=True)
            parts.append(dot(part, directions))
        along = torch.cat(parts)
        if self.scale is None:
            return along.to(torch.promote_types(stack.dtype, directions.dtype))
        return along / self.scale.squeeze(-1)


def _at_least_32_bits(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
