"""Rotary embedding of all heads at one position, as a Triton kernel. Not run on a GPU."""

import triton
import triton.language as tl


@triton.jit
def rotary_fwd_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr,
    stride_x_b, stride_x_p, stride_x_h, stride_x_d,
    stride_cos_b, stride_cos_p, stride_cos_d, stride_sin_b, stride_sin_p, stride_sin_d,
    n_pos, n_heads, d_head, half,
    ADJACENT: tl.constexpr, PASSING: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASSING: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads at one position of one example."""
    place = tl.program_id(0).to(tl.int64)
    batch = place // n_pos
    pos = place % n_pos
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_HALF)
    if ADJACENT:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + half
    is_pair = pair < half
    is_head = head[:, None] < n_heads
    inside = is_head & is_pair[None, :]

    x_row = x_ptr + batch * stride_x_b + pos * stride_x_p + head[:, None] * stride_x_h
    out_row = out_ptr + (place * n_heads + head[:, None]) * d_head
    a = tl.load(x_row + first[None, :] * stride_x_d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_row + second[None, :] * stride_x_d, mask=inside, other=0.0).to(tl.float32)
    cos_row = cos_ptr + batch * stride_cos_b + pos * stride_cos_p
    sin_row = sin_ptr + batch * stride_sin_b + pos * stride_sin_p
    cos_a = tl.load(cos_row + first * stride_cos_d, mask=is_pair, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_row + second * stride_cos_d, mask=is_pair, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_row + first * stride_sin_d, mask=is_pair, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_row + second * stride_sin_d, mask=is_pair, other=0.0).to(tl.float32)
    turned_a = a * cos_a[None, :] - b * sin_a[None, :]
    turned_b = b * cos_b[None, :] + a * sin_b[None, :]
    tl.store(out_row + first[None, :], turned_a.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_row + second[None, :], turned_b.to(out_ptr.dtype.element_ty), mask=inside)
    if PASSING:
        channel = 2 * half + tl.arange(0, BLOCK_PASSING)
        passing = is_head & (channel[None, :] < d_head)
        x = tl.load(x_row + channel[None, :] * stride_x_d, mask=passing, other=0.0)
        tl.store(out_row + channel[None, :], x.to(out_ptr.dtype.element_ty), mask=passing)
