"""Activations in 8 bits a number, with the few channels that would spoil the rest kept exact."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.ops.capture import capture_int8
from fastlens.ops.dequantize import FLOATS, dequantize

# Indices up to here fit into 16 bits.
_FEW = 2**15
# Of float32's bytes, what a row of 512 channels or more may take.
_SHARE = 0.27


class Int8OutlierRows(NamedTuple):
    """An activation in 8 bits a number, most of each row by its roots, and some channels exactly.

    A residual stream has a few channels far larger than all others (position 0 of SmolLM2 reaches
    21,784), and one scale for a whole row then rounds the rest away. Here the scale is set by the
    largest channel that is not kept exactly; and ``values * scale`` are signed square roots, which
    rounds the many small channels less than the few large ones.

    Attributes:
        values: Whole numbers from -127 to 127; 0 where the channel is exact.
        scale: float32; the root of the largest |number| among the other channels, over 127.
        indices: Which channels of each row are exact; 16 bits wide if that is enough.
        exact: Those, in the activation's own dtype.
    """

    values: Int8[Tensor, "*rows d"]
    scale: Float[Tensor, "*rows"]
    indices: Int[Tensor, "*rows k"]
    exact: Float[Tensor, "*rows k"]

    def read(self) -> Float[Tensor, "*rows d"]:
        """The activation again, in its own dtype, as a new tensor.

        **Error.** ``exact`` channels have none. With m the largest of the others, a number x of
        those is off by at most ``(sqrt(|x| * m) / 127 + m / 127**2 / 4) * (1 + 1e-3)``, and by the
        rounding to the dtype if that is 16 bits wide. As the k exact numbers are at least m, a
        row's relative L2 error is at most about ``((d - k) / (4 * k)) ** 0.25 / 127``, 1.7 % of 576
        channels; on SmolLM2's residual streams 0.3 to 0.9 %.

        Zeros are exact. NaN and infinities are if a row has at most k; a row with more reads as NaN
        in its other channels. float64 keeps float32's precision here, and must lie in its range.
        """
        dtype = self.exact.dtype
        wide = dtype if dtype == torch.float64 else torch.float32
        roots = dequantize(self.values, "int8", self.scale, wide)
        read = (roots * roots.abs()).to(dtype)
        return read.scatter_(-1, self.indices.long(), self.exact)

    @property
    def shape(self) -> torch.Size:
        """Of the activation."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """How many axes the activation has."""
        return self.values.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Of the activation, which `read` gives again."""
        return self.exact.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Memory of the four tensors."""
        return sum(tensor.nbytes for tensor in self)

    def on(self, change: Callable[[Tensor], Tensor]) -> "Int8OutlierRows":
        """The same of all four tensors changed, such as rows taken from axes before the last.

        A change must leave the last axis of ``values``, ``indices`` and ``exact`` alone.
        """
        return Int8OutlierRows(*map(change, self))

    def to(self, device: torch.device | str) -> "Int8OutlierRows":
        """On that device."""
        return self.on(lambda tensor: tensor.to(device))


def exact_channels(d: int, dtype: torch.dtype = torch.float32) -> int:
    """How many channels of ``d`` are kept exactly: so many that the row takes 0.27 of float32's.

    At least one; so rows of few channels (under about 200) take more than that.
    """
    each = (2 if d <= _FEW else 4) + dtype.itemsize
    return min(d, max(1, int(_SHARE * 4 * d - d - 4) // each))


def packed_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that `capture_int8_outliers` would make of a whole activation of that shape."""
    d = shape[-1]
    each = (2 if d <= _FEW else 4) + dtype.itemsize
    return torch.Size(shape[:-1]).numel() * (d + 4 + exact_channels(d, dtype) * each)


def capture_int8_outliers(
    activation: Float[Tensor, "*rows d"], k: int | None = None
) -> Int8OutlierRows:
    """An activation in 8 bits a number, but for the ``k`` largest channels of each row.

    About 0.27 of float32's memory for rows of 512 channels and more. `Int8OutlierRows.read` gives
    the activation back and states the error.

    Args:
        activation: Any strides; a row is along the last axis.
        k: By default `exact_channels`.

    Numerics: `capture_int8` of the signed roots of the row without its k largest |numbers|. Not
    differentiable.
    Cost: a search for the largest, three passes over a copy in float32, and `capture_int8` of it.
    Raises: ShapeError for no float tensor, no channels, or more exact ones than there are.
    """
    if activation.dtype not in FLOATS or activation.ndim == 0 or activation.shape[-1] == 0:
        raise ShapeError(
            f"int8 rows were asked for of {activation.dtype} {list(activation.shape)}: they need "
            f"floats, and a last axis of at least one channel. Keep it as it is."
        )
    d = activation.shape[-1]
    k = exact_channels(d, activation.dtype) if k is None else k
    if not 0 <= k <= d:
        raise ShapeError(f"k={k} exact channels of {d}: give 0 to {d}.")
    activation = activation.detach()
    # NaN and infinities count as the largest.
    largest = activation.abs().topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    exact = activation.gather(-1, largest)
    rest = activation.scatter(-1, largest, 0.0)
    rest = rest if rest.dtype == torch.float64 else rest.float()
    values, scale = capture_int8(rest.abs().sqrt_().copysign_(rest), ())
    return Int8OutlierRows(
        values, scale, largest.to(torch.int16 if d <= _FEW else torch.int32), exact
    )
