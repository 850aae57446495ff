"""Gathering and casting by a table in one launch, in Triton. Not run on a GPU."""

import torch
from torch import Tensor

from fastlens.kernels.jit import launch, refusal, tile
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.site_rows import site_rows, starts
from fastlens.kernels.sites import flat_sites

ELEMENTS_PER_PROGRAM = 1024


def capture(activation: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """See `fastlens.ops.capture.capture`. Strided activations are read in place."""
    width, strides = table.shape[1], activation.stride()
    block = activation.shape[width:]
    table = table.detach().to("cpu", torch.int64)
    flat_sites(table, activation.shape[:width])
    out = torch.empty((len(table), *block), dtype=dtype, device=activation.device)
    if out.numel() == 0:
        return out
    rows = site_rows([starts(table, strides[:width])], block, [strides[width:]])
    offsets = rows.offsets[0].to(activation.device)
    block_rows, block_d = tile(rows.length, ELEMENTS_PER_PROGRAM)
    n_programs = -(-len(offsets) // block_rows) * -(-rows.length // block_d)
    launch(
        *("sites", "capture_kernel", (n_programs,), activation.device),
        *(activation, offsets, out, rows.steps[0], len(offsets), rows.length),
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


KERNEL = Kernel("capture", "triton capture", capture, refusal, priority=15, is_opaque=True)
