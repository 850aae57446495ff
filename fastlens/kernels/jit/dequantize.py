"""Unpacking int8 rows and llama.cpp's 4- and 8-bit blocks, as Triton kernels. Not run on a GPU.

Launched without fusion of products and sums, as the specification reads. No bit depends on it: the
only product that a sum follows, of a float16 by 4 bits, is exact in float32.
"""

import triton
import triton.language as tl


@triton.jit
def dequantize_rows_kernel(
    packed_ptr, scale_ptr, out_ptr, n_rows, length,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of BLOCK_ROWS int8 rows, each with its scale."""
    n_pieces = tl.cdiv(length, BLOCK_D)
    place = tl.program_id(0).to(tl.int64)
    row = (place // n_pieces) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (place % n_pieces) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_row = row < n_rows
    inside = is_row[:, None] & (column < length)[None, :]
    at = row[:, None] * length + column[None, :]
    scale = tl.load(scale_ptr + row, mask=is_row, other=0.0)
    weights = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.float32) * scale[:, None]
    tl.store(out_ptr + at, weights.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _half_at(byte_ptr, mask):
    # Blocks start at any address, so their float16 is put together from bytes.
    low = tl.load(byte_ptr, mask=mask, other=0).to(tl.uint16)
    high = tl.load(byte_ptr + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dequantize_blocks_kernel(
    packed_ptr, out_ptr, n_blocks,
    BITS: tl.constexpr, HAS_MINIMUM: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCKS blocks of 32 weights; BITS and HAS_MINIMUM tell the formats apart."""
    HEADER: tl.constexpr = 2 + 2 * HAS_MINIMUM
    BYTES: tl.constexpr = HEADER + 4 * BITS
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < n_blocks
    inside = is_block[:, None]
    weight = tl.arange(0, 32)[None, :]
    first = packed_ptr + block * BYTES
    d = _half_at(first, is_block)[:, None]
    if BITS == 8:
        byte = tl.load(first[:, None] + HEADER + weight, mask=inside, other=0)
        out = d * byte.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        byte = tl.load(first[:, None] + HEADER + weight % 16, mask=inside, other=0)
        q = tl.where(weight < 16, byte & 15, byte >> 4).to(tl.int32)
        if HAS_MINIMUM:
            out = d * q.to(tl.float32) + _half_at(first + 2, is_block)[:, None]
        else:
            out = d * (q - 8).to(tl.float32)
    at = block[:, None] * 32 + weight
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
