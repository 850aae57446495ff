"""Keeping a few vectors of an activation: gathered, cast or quantised, and copied in one pass."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.kernels.sites import check_table
from fastlens.ops.dequantize import FLOATS, dequantize
from fastlens.ops.dispatch import kernel_for
from fastlens.slices import Slice, SliceInput

Where: TypeAlias = Tensor | Sequence[SliceInput | Slice]


class Int8Rows(NamedTuple):
    """An activation in 8 bits a number: ``values * scale``, one scale a row of the last axis.

    Attributes:
        values: Whole numbers from -127 to 127.
        scale: float32; the largest |number| of the row, over 127.
    """

    values: Int8[Tensor, "*rows d"]
    scale: Float[Tensor, "*rows"]

    def read(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*rows d"]:
        """The activation again, each number off by at most ``scale * (1/2 + 2**-15)``.

        That is max|row| / 254, and the rounding to ``dtype`` if that is 16 bits wide. Rows whose
        largest number is under 127 * 2**-126 read as zeros. A row that held NaN or an infinity
        reads as NaN throughout.
        """
        return dequantize(self.values, "int8", self.scale, dtype)


def capture(
    activation: Float[Tensor, "*axes"], where: Where, dtype: torch.dtype | None = None
) -> Float[Tensor, "*captured"]:
    """The named vectors of an activation, cast, as a copy that keeps nothing else alive.

    Args:
        activation: Any strides.
        where: A table ``[site, width]``, as for `patch_sites` (sites may repeat), which gives
            ``[site, *block]``; or one choice for each of the first axes, each as `Slice` takes it
            (None is all, an int drops the axis), which gives the sliced activation.
        dtype: Of the result; that of the activation by default.

    Returns: A new contiguous tensor, never a view.

    Numerics: one rounding to ``dtype``. Differentiable in the activation.
    Cost: reads and writes the captured vectors only. On CUDA the kernel in csrc/ is taken if it
    was built, else Triton's if ``FASTLENS_TRITON=1``; neither was run on a GPU. ``torch.compile``
    traces a table whole, and breaks its graph at lists among slices.
    Raises: SiteError for an index below 0 or past the end, before anything is launched; ShapeError
        for a table or slices that do not fit. Indices of slices may count from the end.
    """
    dtype = activation.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise ShapeError(f"cannot capture as {dtype}: give a float type, or use capture_int8.")
    place = _Place(activation, where, activation.ndim)
    if place.is_view:
        view = place.activation
        return view.to(dtype, memory_format=torch.contiguous_format, copy=True)
    captured = torch.ops.fastlens.capture(place.activation, place.table, dtype)
    return captured.reshape(place.shape)


def capture_int8(activation: Float[Tensor, "*axes d"], where: Where) -> Int8Rows:
    """As `capture`, in 8 bits a number and one float32 scale a row of the last axis.

    A quarter of float32's memory. `Int8Rows.read` gives the activation back and states the error.
    Each row is scaled by its own largest number, so outlier channels cost the others precision.

    Args:
        activation, where: As in `capture`; the last axis is kept whole.

    Numerics: ``scale = max|x| / 127`` and ``round(x / scale)`` in float32, ties to even. Not
    differentiable.
    Cost: reads the captured vectors once from memory. On CUDA the kernel in csrc/ is taken if it
    was built, else Triton's if ``FASTLENS_TRITON=1``; neither was run on a GPU.
    Raises: As `capture`.
    """
    place = _Place(activation, where, activation.ndim - 1)
    table = place.table
    if place.is_view:
        # A table of width 0 names everything at once.
        table = torch.zeros(1, 0, dtype=torch.int64)
    values, scale = torch.ops.fastlens.capture_int8(place.activation, table)
    shape = place.activation.shape if place.is_view else place.shape
    return Int8Rows(values.reshape(shape), scale.reshape(shape[:-1]))


class _Place:
    """What is captured, as a view to take whole or as a table on a view."""

    def __init__(self, activation: Tensor, where: Where, most: int):
        self.is_view = False
        self.activation = activation
        if isinstance(where, Tensor):
            check_table(where, activation.ndim, most)
            self.table = where
            self.shape = (len(where), *activation.shape[where.shape[1] :])
            return
        choices = [one if isinstance(one, Slice) else Slice(one) for one in where]
        if len(choices) > most:
            raise ShapeError(
                f"{len(choices)} slices for an activation {list(activation.shape)}, of which at "
                f"most {most} axes can be chosen from here. Leave out the last."
            )
        self._slice(activation, choices)

    def _slice(self, activation: Tensor, choices: list[Slice]) -> None:
        """Ranges and single places by a view, lists by a table over the axes up to the last."""
        lists: dict[int, Tensor] = {}
        axis = 0
        for choice in choices:
            length = activation.shape[axis]
            try:
                indices = choice.indices(length)
            except IndexError:
                raise _outside(choice, length, axis) from None
            if bool(((indices < -length) | (indices >= length)).any()):
                raise _outside(choice, length, axis)
            if choice.mode == "array":
                lists[axis] = torch.from_numpy(indices % max(length, 1))
            elif choice.mode != "identity":
                activation = choice.apply(activation, axis)
            # A single place drops its axis.
            axis += choice.mode != "int"
        self.activation = activation
        self.is_view = not lists
        self.table = torch.zeros(0, 0, dtype=torch.int64)
        self.shape = tuple(activation.shape)
        if lists:
            width = max(lists) + 1
            along = [lists.get(a, torch.arange(activation.shape[a])) for a in range(width)]
            self.table = torch.cartesian_prod(*along).reshape(-1, width)
            self.shape = (*map(len, along), *activation.shape[width:])


def _outside(choice: Slice, length: int, axis: int) -> ShapeError:
    return ShapeError(f"{choice} reaches outside axis {axis}, which has {length} places.")


# -- the ops that compilers see --------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastlens", "FRAGMENT")
_LIBRARY.define("capture(Tensor activation, Tensor table, ScalarType dtype) -> Tensor")
_LIBRARY.define("capture_int8(Tensor activation, Tensor table) -> (Tensor, Tensor)")


def _capture(activation: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    return kernel_for("capture", activation.device.type, activation.dtype)(activation, table, dtype)


def _capture_fake(activation: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    return activation.new_empty((table.shape[0], *activation.shape[table.shape[1] :]), dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    activation, table, _ = inputs
    ctx.save_for_backward(table)
    ctx.like = activation.shape, activation.dtype


def _backward(ctx, grad: Tensor):
    (table,) = ctx.saved_tensors
    shape, dtype = ctx.like
    index = tuple(table.to(grad.device, torch.int64).unbind(1))
    if not index:
        return grad.sum(0).to(dtype), None, None
    # A site may have been captured more than once.
    zeros = torch.zeros(shape, dtype=dtype, device=grad.device)
    return zeros.index_put(index, grad.to(dtype), accumulate=True), None, None


def _capture_int8(activation: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return kernel_for("capture_int8", activation.device.type, activation.dtype)(activation, table)


def _capture_int8_fake(activation: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    shape = (table.shape[0], *activation.shape[table.shape[1] :])
    values = activation.new_empty(shape, dtype=torch.int8)
    return values, activation.new_empty(shape[:-1], dtype=torch.float32)


_LIBRARY.impl("capture", _capture, "CompositeExplicitAutograd")
_LIBRARY.impl("capture_int8", _capture_int8, "CompositeExplicitAutograd")
torch.library.register_fake("fastlens::capture", _capture_fake, lib=_LIBRARY)
torch.library.register_fake("fastlens::capture_int8", _capture_int8_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "fastlens::capture", _backward, setup_context=_setup_context, lib=_LIBRARY
)
