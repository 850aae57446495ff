"""Patching a copy by a table, in Triton (`triton_patch_sites_in_place`). Not run on a GPU."""

import torch
from torch import Tensor

from fastlens.kernels.jit import refusal
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.triton_patch_sites_in_place import patch_sites_


def patch_sites(activation: Tensor, table: Tensor, values: Tensor | None, mode: str) -> Tensor:
    """See `fastlens.ops.patch_sites.patch_sites`. Copies by torch, then one launch."""
    out = activation.detach().clone(memory_format=torch.contiguous_format)
    patch_sites_(out, table, values, mode, False)
    return out


KERNEL = Kernel(
    "patch_sites", "triton patch_sites", patch_sites, refusal, priority=15, is_opaque=True
)
