"""Gathering and quantising by a table in one launch, in Triton. Not run on a GPU."""

import torch
from torch import Tensor

from fastlens.kernels.cuda_capture import row_offsets
from fastlens.kernels.jit import launch, refusal, tile
from fastlens.kernels.kernel import Kernel

ELEMENTS_PER_PROGRAM = 2048


def capture_int8(activation: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastlens.ops.capture.capture_int8`. Strided activations are read in place."""
    shape = (len(table), *activation.shape[table.shape[1] :])
    offsets = row_offsets(activation, table)
    values = torch.empty(shape, dtype=torch.int8, device=activation.device)
    scale = torch.empty(shape[:-1], dtype=torch.float32, device=activation.device)
    if values.numel() == 0:
        return values, scale.zero_()
    block_rows, block_d = tile(shape[-1], ELEMENTS_PER_PROGRAM)
    # Fewer rows and more programs where there are few rows to share out.
    block_rows = min(block_rows, 16)
    offsets = offsets.to(activation.device)
    launch(
        *("sites", "capture_int8_kernel", (-(-len(offsets) // block_rows),), activation.device),
        *(activation, offsets, values, scale),
        *(activation.stride(-1), len(offsets), shape[-1]),
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return values, scale


KERNEL = Kernel(
    "capture_int8", "triton capture_int8", capture_int8, refusal, priority=15, is_opaque=True
)
