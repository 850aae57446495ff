"""Patching by a table in one launch of csrc/patch_sites.cu (not run on a GPU)."""

import math

import torch
from torch import Tensor

from fastlens.kernels import compiled
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.sites import flat_sites


def patch_sites(activation: Tensor, table: Tensor, values: Tensor | None, mode: str) -> Tensor:
    """See `fastlens.ops.patch_sites.patch_sites`. Copies by torch, then one launch."""
    lengths, block = activation.shape[: table.shape[1]], activation.shape[table.shape[1] :]
    length = math.prod(block)
    sites = flat_sites(table, lengths, distinct=True)
    out = activation.clone(memory_format=torch.contiguous_format)
    if len(sites) == 0 or length == 0:
        return out
    places = torch.arange(len(sites))
    site_stride = step = n_samples = sample_stride = 0
    if values is not None:
        values = values.to(out.dtype)
        if mode == "mean":
            places = flat_sites(table[:, 1:], lengths[1:])
            values = values.contiguous()
            site_stride, step = length, 1
            n_samples, sample_stride = len(values), values[0].numel()
        else:
            # A view where the broadcast allows it: one vector for all sites is not repeated.
            values = values.expand(len(sites), *block).reshape(len(sites), length)
            site_stride, step = values.stride()
    # One copy to the GPU for both.
    indices = torch.stack([sites, places]).to(out.device)
    with compiled.on_device(out):
        compiled.launchers().patch_sites(
            out.data_ptr(),
            indices[0].data_ptr(),
            indices[1].data_ptr(),
            0 if values is None else values.data_ptr(),
            len(sites),
            length,
            site_stride,
            step,
            n_samples,
            sample_stride,
            compiled.MODES[mode],
            compiled.DTYPES[out.dtype],
            compiled.stream(out),
        )
    return out


KERNEL = Kernel("patch_sites", "CUDA C++ patch_sites", patch_sites, compiled.refuses, priority=20)
