"""Packed weights and activations, unpacked."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fastlens.errors import ShapeError, did_you_mean
from fastlens.kernels.reference_packed import FORMATS
from fastlens.ops.dispatch import kernel_for

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dequantize(
    packed: Shaped[Tensor, "*rows n_bytes"],
    packed_as: str,
    scale: Float[Tensor, "*rows"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*rows width"]:
    """The numbers that packed rows stand for.

    * ``"int8"``: ``q * scale``, int8 numbers and one scale a row (`capture_int8` makes them).
    * ``"Q8_0"``: blocks of 32 weights in 34 bytes: a float16 ``d``, then 32 int8; ``d * q``.
    * ``"Q4_0"``: in 18 bytes: ``d``, then 16 bytes; ``d * (q - 8)``. The low four bits of the bytes
      are weights 0 to 15, the high four bits weights 16 to 31.
    * ``"Q4_1"``: in 20 bytes: ``d`` and a float16 ``m``, then bytes as in Q4_0; ``d * q + m``.

    The last three are llama.cpp's, as they stand in GGUF files.

    Args:
        packed: int8 rows, or uint8 rows of whole blocks.
        packed_as: One of the above.
        scale: For ``"int8"`` only.
        dtype: Of the result.

    Numerics: computed in float32, each product and sum rounded (no fused multiply-add), then
    rounded once to ``dtype``: bit for bit what the gguf package gives in float32. Not
    differentiable.
    Cost: reads the packed bytes and writes the result, once each. On CUDA the kernel in csrc/ is
    taken if it was built, else Triton's if ``FASTLENS_TRITON=1``; neither was run on a GPU.
    Raises: ShapeError for an unknown format, or rows, scales or a dtype that do not fit it.
    """
    if packed_as not in FORMATS:
        near = did_you_mean(packed_as, FORMATS)
        raise ShapeError(f"no packed format {packed_as!r}: {', '.join(FORMATS)}.{near}")
    if dtype not in FLOATS:
        raise ShapeError(f"cannot dequantise to {dtype}: give a float type.")
    wanted = torch.int8 if packed_as == "int8" else torch.uint8
    if packed.dtype != wanted:
        raise ShapeError(f"{packed_as} is stored as {wanted}, and packed is {packed.dtype}.")
    if packed.ndim == 0 or packed.shape[-1] % FORMATS[packed_as].n_bytes:
        raise ShapeError(
            f"a row of {packed_as} is a whole number of blocks of {FORMATS[packed_as].n_bytes} "
            f"bytes; packed is {list(packed.shape)}."
        )
    if (scale is not None) != (packed_as == "int8"):
        raise ShapeError(f"int8 needs a scale and the other formats hold their own ({packed_as}).")
    if scale is not None and scale.shape != packed.shape[:-1]:
        raise ShapeError(
            f"scale is one number a row, {list(packed.shape[:-1])}; got {list(scale.shape)}."
        )
    return torch.ops.fastlens.dequantize(packed, scale, packed_as, dtype)


# -- the op that compilers see ---------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastlens", "FRAGMENT")
_LIBRARY.define(
    "dequantize(Tensor packed, Tensor? scale, str packed_as, ScalarType dtype) -> Tensor"
)


def _dequantize(packed: Tensor, scale: Tensor | None, packed_as: str, dtype: torch.dtype) -> Tensor:
    kernel = kernel_for("dequantize", packed.device.type, dtype)
    return kernel(packed, scale, packed_as, dtype)


def _fake(packed: Tensor, scale: Tensor | None, packed_as: str, dtype: torch.dtype) -> Tensor:
    # A compiler's sizes are symbols, which `unpacked_width` does not take.
    block = FORMATS[packed_as]
    width = packed.shape[-1] // block.n_bytes * block.weights
    return packed.new_empty((*packed.shape[:-1], width), dtype=dtype)


_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("fastlens::dequantize", _fake, lib=_LIBRARY)
