"""Patching by a table in place: what torch's own indexing does, written where it reads."""

import torch
from torch import Tensor

from fastlens.kernels.kernel import Kernel
from fastlens.kernels.sites import flat_sites


def patch_sites_(
    activation: Tensor, table: Tensor, values: Tensor | None, mode: str, is_checked: bool
) -> None:
    """See `fastlens.ops.patch_sites.patch_sites_`. Any strides; nothing is read but the sites."""
    if not is_checked:
        flat_sites(table, activation.shape[: table.shape[1]], distinct=True)
    index = tuple(table.to(activation.device, torch.int64).unbind(1))
    if mode == "zero":
        activation[index] = 0.0
        return
    assert values is not None
    v = values.to(activation.dtype)
    if mode == "mean":
        v = v[(slice(None), *index[1:])].mean(0)
    elif mode == "add":
        v = activation[index] + v
    elif mode == "scale":
        v = activation[index] * v
    activation[index] = v


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel("patch_sites_", "torch indexing", patch_sites_, _refuses, priority=10)
