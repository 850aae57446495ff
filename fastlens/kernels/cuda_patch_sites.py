"""Patching a copy by a table in one launch of csrc/patch_sites.cu (not run on a GPU)."""

import torch
from torch import Tensor

from fastlens.kernels import compiled
from fastlens.kernels.cuda_patch_sites_in_place import patch_sites_
from fastlens.kernels.kernel import Kernel


def patch_sites(activation: Tensor, table: Tensor, values: Tensor | None, mode: str) -> Tensor:
    """See `fastlens.ops.patch_sites.patch_sites`. Copies by torch, then one launch."""
    out = activation.detach().clone(memory_format=torch.contiguous_format)
    patch_sites_(out, table, values, mode, False)
    return out


KERNEL = Kernel(
    "patch_sites",
    "CUDA C++ patch_sites",
    patch_sites,
    compiled.refuses,
    priority=20,
    is_opaque=True,
)
