"""Patching and capturing rows of a strided activation, as Triton kernels. Not run on a GPU."""

import triton
import triton.language as tl

# The largest float32, and 127 times the smallest normal one: smaller scales lose digits.
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
LEAST_KEPT: tl.constexpr = tl.constexpr(127 * 2.0**-126)
# Added to and taken from a number below 2^22 it leaves the nearest whole one, ties to even.
ROUNDING: tl.constexpr = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def patch_sites_kernel(
    x_ptr, rows_ptr, values_ptr, value_rows_ptr,
    step, step_values, stride_sample, n_samples, count, n_rows, length,
    MODE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of BLOCK_ROWS rows; the rows' starts stand in two tables.

    ``count`` is ``n_samples`` as a float. Modes are those of `fastlens.ops.patch_sites`.
    """
    n_pieces = tl.cdiv(length, BLOCK_D)
    place = tl.program_id(0).to(tl.int64)
    row = (place // n_pieces) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (place % n_pieces) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_row = row < n_rows
    inside = is_row[:, None] & (column < length)[None, :]
    start = tl.load(rows_ptr + row, mask=is_row, other=0)
    here = x_ptr + start[:, None] + column[None, :] * step

    if MODE == "zero":
        out = tl.zeros([BLOCK_ROWS, BLOCK_D], x_ptr.dtype.element_ty)
    else:
        value_start = tl.load(value_rows_ptr + row, mask=is_row, other=0)
        given = values_ptr + value_start[:, None] + column[None, :] * step_values
        if MODE == "replace":
            out = tl.load(given, mask=inside, other=0.0)
        elif MODE == "mean":
            # What each sum lost to rounding is taken from the next number (Kahan).
            total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
            lost = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
            for _ in range(n_samples):
                v = tl.load(given, mask=inside, other=0.0).to(tl.float32) - lost
                larger = total + v
                lost = (larger - total) - v
                # An infinity minus itself.
                lost = tl.where(lost == lost, lost, 0.0)
                total = larger
                given += stride_sample
            out = tl.math.div_rn(total, tl.zeros_like(total) + count)
        else:
            x = tl.load(here, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(given, mask=inside, other=0.0).to(tl.float32)
            out = x + v if MODE == "add" else x * v
    tl.store(here, out.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def capture_kernel(
    x_ptr, rows_ptr, out_ptr, step, n_rows, length,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of BLOCK_ROWS rows, cast."""
    n_pieces = tl.cdiv(length, BLOCK_D)
    place = tl.program_id(0).to(tl.int64)
    row = (place // n_pieces) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (place % n_pieces) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_row = row < n_rows
    inside = is_row[:, None] & (column < length)[None, :]
    start = tl.load(rows_ptr + row, mask=is_row, other=0)
    x = tl.load(x_ptr + start[:, None] + column[None, :] * step, mask=inside, other=0.0)
    if x_ptr.dtype.element_ty != out_ptr.dtype.element_ty:
        # By way of float32, which holds each exactly: one rounding.
        x = x.to(tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * length + column[None, :], x, mask=inside)


@triton.jit
def capture_int8_kernel(
    x_ptr, rows_ptr, values_ptr, scale_ptr, step, n_rows, length,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS whole rows, first their largest numbers, then their bytes."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    is_row = row < n_rows
    start = tl.load(rows_ptr + row, mask=is_row, other=0).to(tl.int64)
    first = x_ptr + start[:, None]

    largest = tl.zeros([BLOCK_ROWS], tl.float32)
    n_infinite = tl.zeros([BLOCK_ROWS], tl.int32)
    for done in range(0, length, BLOCK_D):
        j = (done + column).to(tl.int64)[None, :]
        inside = is_row[:, None] & (j < length)
        size = tl.abs(tl.load(first + j * step, mask=inside, other=0.0).to(tl.float32))
        # False for NaN too, which a maximum would drop.
        is_finite = size <= LARGEST
        largest = tl.maximum(largest, tl.max(tl.where(is_finite, size, 0.0), 1))
        n_infinite += tl.sum(tl.where(is_finite, 0, 1), 1)

    is_kept = (n_infinite == 0) & (largest >= LEAST_KEPT)
    scale = tl.math.div_rn(largest, tl.full([BLOCK_ROWS], 127.0, tl.float32))
    divisor = tl.where(is_kept, scale, 1.0)[:, None]
    scale = tl.where(is_kept, scale, 0.0)
    scale = tl.where(n_infinite == 0, scale, float("nan"))
    tl.store(scale_ptr + row, scale, mask=is_row)

    for done in range(0, length, BLOCK_D):
        j = (done + column).to(tl.int64)[None, :]
        inside = is_row[:, None] & (j < length)
        x = tl.load(first + j * step, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(is_kept[:, None], x, 0.0)
        q = tl.math.div_rn(x, divisor + tl.zeros_like(x))
        q = (q + ROUNDING) - ROUNDING
        q = tl.minimum(tl.maximum(q, -127.0), 127.0).to(tl.int32)
        tl.store(values_ptr + row[:, None] * length + j, q.to(tl.int8), mask=inside)
