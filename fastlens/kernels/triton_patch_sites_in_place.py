"""Patching by a table in one launch, written into the activation, in Triton. Not run on a GPU."""

import torch
from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.kernels.jit import launch, refusal, tile
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.site_rows import site_rows, starts
from fastlens.kernels.sites import flat_sites

ELEMENTS_PER_PROGRAM = 1024
# A mean keeps two numbers and an address of each.
ELEMENTS_OF_A_MEAN = 512


def patch_sites_(
    activation: Tensor, table: Tensor, values: Tensor | None, mode: str, is_checked: bool
) -> None:
    """See `fastlens.ops.patch_sites.patch_sites_`. Any strides but those of an expanded tensor.

    Where ``is_checked``, a table on the GPU is not read here, and nothing waits for it.
    """
    width, n_sites = table.shape[1], len(table)
    block, strides = activation.shape[width:], activation.stride()
    if not is_checked:
        table = table.detach().to("cpu", torch.int64)
        flat_sites(table, activation.shape[:width], distinct=True)
    if n_sites == 0 or block.numel() == 0:
        return
    refuse_shared_places(activation)
    firsts, inner = [starts(table, strides[:width])], [strides[width:]]
    n_samples = stride_sample = 0
    if values is not None:
        values = apart(values.detach(), activation).to(activation.dtype)
        if mode == "mean":
            n_samples, stride_sample = len(values), values.stride(0)
            firsts.append(starts(table[:, 1:], values.stride()[1:width]))
            inner.append(values.stride()[width:])
        else:
            # A view: one vector for all sites is read at one place.
            values = values.expand(n_sites, *block)
            numbers = torch.arange(n_sites, device=table.device)
            firsts.append(numbers * values.stride(0))
            inner.append(values.stride()[1:])
    rows = site_rows(firsts, block, inner)
    offsets = rows.offsets.to(activation.device)
    n_rows = offsets.shape[1]
    elements = ELEMENTS_OF_A_MEAN if mode == "mean" else ELEMENTS_PER_PROGRAM
    block_rows, block_d = tile(rows.length, elements)
    n_pieces = -(-rows.length // block_d)
    launch(
        *("sites", "patch_sites_kernel", (-(-n_rows // block_rows) * n_pieces,), activation.device),
        *(activation, offsets[0], values, None if values is None else offsets[1]),
        *(rows.steps[0], 0 if values is None else rows.steps[1]),
        *(stride_sample, n_samples, float(n_samples), n_rows, rows.length),
        MODE=mode,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=4,
        enable_fp_fusion=False,
    )


def apart(values: Tensor, activation: Tensor) -> Tensor:
    """The values, as a copy if they may lie where the activation does and is written."""
    shared = values.untyped_storage().data_ptr() == activation.untyped_storage().data_ptr()
    return values.clone() if shared else values


def refuse_shared_places(activation: Tensor) -> None:
    """Raises: ShapeError if two indices of the activation are one place in memory."""
    pairs = zip(activation.shape, activation.stride(), strict=True)
    if any(length > 1 and stride == 0 for length, stride in pairs):
        raise ShapeError(
            f"cannot patch in place an expanded activation {list(activation.shape)}, strides "
            f"{list(activation.stride())}: several indices are one place in memory. Clone it."
        )


KERNEL = Kernel(
    "patch_sites_", "triton patch_sites_", patch_sites_, refusal, priority=15, is_opaque=True
)
