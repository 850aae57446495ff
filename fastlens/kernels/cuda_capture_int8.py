"""Gathering and quantising by a table in one launch of csrc/capture.cu (not run on a GPU)."""

import torch
from torch import Tensor

from fastlens.kernels import compiled
from fastlens.kernels.cuda_capture import row_offsets
from fastlens.kernels.kernel import Kernel


def capture_int8(activation: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastlens.ops.capture.capture_int8`. Strided activations are read in place."""
    shape = (len(table), *activation.shape[table.shape[1] :])
    values = activation.new_empty(shape, dtype=torch.int8)
    scale = activation.new_zeros(shape[:-1], dtype=torch.float32)
    offsets = row_offsets(activation, table)
    if values.numel() == 0:
        return values, scale
    offsets = offsets.to(activation.device)
    with compiled.on_device(activation):
        compiled.launchers().capture_int8(
            activation.data_ptr(),
            offsets.data_ptr(),
            values.data_ptr(),
            scale.data_ptr(),
            len(offsets),
            shape[-1],
            activation.stride(-1),
            compiled.DTYPES[activation.dtype],
            compiled.stream(activation),
        )
    return values, scale


KERNEL = Kernel(
    "capture_int8",
    "CUDA C++ capture_int8",
    capture_int8,
    compiled.refuses,
    priority=20,
    is_opaque=True,
)
