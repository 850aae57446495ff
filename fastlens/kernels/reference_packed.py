"""The specification of `dequantize`: packed weights in each format, as its formula reads.

The GGUF formats are those of ggml (block of 32 weights; ``ggml/src/ggml-quants.c``).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


class PackedFormat(NamedTuple):
    """How many weights one block holds, and in how many bytes."""

    weights: int
    n_bytes: int


# int8 has one weight a byte and its scales apart.
FORMATS = {
    "int8": PackedFormat(1, 1),
    "Q4_0": PackedFormat(32, 18),
    "Q4_1": PackedFormat(32, 20),
    "Q8_0": PackedFormat(32, 34),
}


def unpacked_width(width: int, packed_as: str) -> int:
    """Weights in a row of ``width`` bytes, which is a whole number of blocks."""
    block = FORMATS[packed_as]
    return width // block.n_bytes * block.weights


def dequantize(
    packed: Shaped[Tensor, "*rows n_bytes"],
    scale: Float[Tensor, "*rows"] | None,
    packed_as: str,
    dtype: torch.dtype,
) -> Float[Tensor, "*rows width"]:
    """Weights in ``dtype``, computed in float32 and rounded once."""
    if packed_as == "int8":
        assert scale is not None
        return (packed.float() * scale.float()[..., None]).to(dtype)
    rows, n_bytes = packed.shape[:-1], packed.shape[-1]
    blocks = packed.reshape(-1, FORMATS[packed_as].n_bytes)
    d = _half(blocks, 0)
    if packed_as == "Q8_0":
        weights = d * blocks[:, 2:].contiguous().view(torch.int8).float()
    elif packed_as == "Q4_0":
        weights = d * (_nibbles(blocks[:, 2:]).float() - 8)
    else:
        weights = d * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)
    return weights.reshape(*rows, unpacked_width(n_bytes, packed_as)).to(dtype)


def _half(blocks: Tensor, first: int) -> Tensor:
    """The float16 that starts at that byte of each block, as float32 ``[block, 1]``."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


def _nibbles(blocks: Tensor) -> Tensor:
    """The low four bits of all bytes, then the high four bits."""
    return torch.cat([blocks & 15, blocks >> 4], 1)
