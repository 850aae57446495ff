"""Unpacking packed weights in one launch of csrc/dequantize.cu (not run on a GPU)."""

import torch
from torch import Tensor

from fastlens.kernels import compiled
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.reference_packed import FORMATS, unpacked_width


def dequantize(packed: Tensor, scale: Tensor | None, packed_as: str, dtype: torch.dtype) -> Tensor:
    """See `fastlens.ops.dequantize.dequantize`."""
    packed = packed.contiguous()
    width = unpacked_width(packed.shape[-1], packed_as)
    out = packed.new_empty((*packed.shape[:-1], width), dtype=dtype)
    if out.numel() == 0:
        return out
    scale = None if scale is None else scale.float().contiguous()
    with compiled.on_device(packed):
        compiled.launchers().dequantize(
            packed.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            out.data_ptr(),
            packed.numel() // FORMATS[packed_as].n_bytes,
            width,
            compiled.FORMATS[packed_as],
            compiled.DTYPES[dtype],
            compiled.stream(packed),
        )
    return out


KERNEL = Kernel(
    "dequantize", "CUDA C++ dequantize", dequantize, compiled.refuses, priority=20, is_opaque=True
)
