"""LayerNorm and RMSNorm of whole rows held in registers, as one Triton kernel. Not run on a GPU."""

import triton
import triton.language as tl


@triton.jit
def norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, out_ptr, mean_ptr, scale_ptr,
    stride_x_row, stride_x_d, stride_w, stride_b,
    n_rows, d, eps,
    CENTRE: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS rows; BLOCK_D is at least ``d``, so a row is read once."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_D)
    is_row = row < n_rows
    is_channel = channel < d
    inside = is_row[:, None] & is_channel[None, :]
    x = tl.load(
        x_ptr + row[:, None] * stride_x_row + channel[None, :] * stride_x_d, mask=inside, other=0.0
    ).to(tl.float32)  # [BLOCK_ROWS, BLOCK_D]
    if CENTRE:
        mean = tl.sum(x, 1) / d
        tl.store(mean_ptr + row, mean, mask=is_row)
        # Padding must not count: zero minus the mean is not zero.
        x = tl.where(inside, x - mean[:, None], 0.0)
    scale = tl.sqrt_rn(tl.sum(x * x, 1) / d + eps)
    tl.store(scale_ptr + row, scale, mask=is_row)
    # A row outside may have a scale of zero if eps is zero.
    out = x / tl.where(is_row, scale, 1.0)[:, None]
    if GAIN:
        w = tl.load(w_ptr + channel * stride_w, mask=is_channel, other=0.0).to(tl.float32)
        out = out * w[None, :]
    if BIAS:
        b = tl.load(b_ptr + channel * stride_b, mask=is_channel, other=0.0).to(tl.float32)
        out = out + b[None, :]
    tl.store(
        out_ptr + row[:, None] * d + channel[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside,
    )
