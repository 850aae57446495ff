"""Gathering and casting by a table in one launch of csrc/capture.cu (not run on a GPU)."""

import math

import torch
from torch import Tensor

from fastlens.kernels import compiled
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.sites import flat_sites


def row_offsets(activation: Tensor, table: Tensor) -> Tensor:
    """Where in memory each captured row of the last axis starts, in elements; on the CPU.

    Raises: SiteError, as `flat_sites`.
    """
    width = table.shape[1]
    flat_sites(table, activation.shape[:width])
    strides = torch.tensor(activation.stride(), dtype=torch.int64)
    offsets = (table.detach().to("cpu", torch.int64) * strides[:width]).sum(1)
    for axis in range(width, activation.ndim - 1):
        along = torch.arange(activation.shape[axis]) * strides[axis]
        offsets = offsets[..., None] + along
    return offsets.flatten()


def capture(activation: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """See `fastlens.ops.capture.capture`. Strided activations are read in place."""
    block = activation.shape[table.shape[1] :]
    out = activation.new_empty((len(table), *block), dtype=dtype)
    offsets = row_offsets(activation, table)
    length = block[-1] if block else 1
    if math.prod(out.shape) == 0:
        return out
    offsets = offsets.to(activation.device)
    with compiled.on_device(activation):
        compiled.launchers().capture(
            activation.data_ptr(),
            offsets.data_ptr(),
            out.data_ptr(),
            len(offsets),
            length,
            activation.stride(-1) if block else 0,
            compiled.DTYPES[activation.dtype],
            compiled.DTYPES[dtype],
            compiled.stream(activation),
        )
    return out


KERNEL = Kernel("capture", "CUDA C++ capture", capture, compiled.refuses, 20, is_opaque=True)
