"""Unpacking packed weights in one launch, in Triton. Not run on a GPU."""

import torch
from torch import Tensor

from fastlens.kernels.jit import launch, refusal, tile
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.reference_packed import FORMATS, unpacked_width

ELEMENTS_PER_PROGRAM = 1024
# Bits a weight, and whether a block has a minimum beside its scale.
BLOCKS = {"Q8_0": (8, False), "Q4_0": (4, False), "Q4_1": (4, True)}


def dequantize(packed: Tensor, scale: Tensor | None, packed_as: str, dtype: torch.dtype) -> Tensor:
    """See `fastlens.ops.dequantize.dequantize`."""
    packed = packed.contiguous()
    width = unpacked_width(packed.shape[-1], packed_as)
    out = torch.empty((*packed.shape[:-1], width), dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    if packed_as == "int8":
        assert scale is not None
        n_rows = packed.numel() // width
        block_rows, block_d = tile(width, ELEMENTS_PER_PROGRAM)
        n_programs = -(-n_rows // block_rows) * -(-width // block_d)
        launch(
            *("dequantize", "dequantize_rows_kernel", (n_programs,), packed.device),
            *(packed, scale.float().contiguous(), out, n_rows, width),
            BLOCK_ROWS=block_rows,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=False,
        )
        return out
    bits, has_minimum = BLOCKS[packed_as]
    n_blocks = packed.numel() // FORMATS[packed_as].n_bytes
    at_once = ELEMENTS_PER_PROGRAM // FORMATS[packed_as].weights
    launch(
        *("dequantize", "dequantize_blocks_kernel", (-(-n_blocks // at_once),), packed.device),
        *(packed, out, n_blocks),
        BITS=bits,
        HAS_MINIMUM=has_minimum,
        BLOCKS=at_once,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


KERNEL = Kernel("dequantize", "triton dequantize", dequantize, refusal, priority=15, is_opaque=True)
