"""Patching by a table in one launch of csrc/patch_sites.cu, in place (not run on a GPU)."""

import torch
from torch import Tensor

from fastlens.kernels import compiled, jit, torch_patch_sites_in_place, triton_patch_sites_in_place
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.site_rows import merged, starts
from fastlens.kernels.sites import flat_sites
from fastlens.kernels.triton_patch_sites_in_place import apart, refuse_shared_places


def patch_sites_(
    activation: Tensor, table: Tensor, values: Tensor | None, mode: str, is_checked: bool
) -> None:
    """See `fastlens.ops.patch_sites.patch_sites_`.

    The kernel knows an activation as blocks of one length, one after another. Contiguous ones are
    such, slices like the queries of one projection of q, k and v, and sliced or transposed leading
    axes. Of other strides Triton's kernel makes one launch, and without it torch its several.
    """
    width = table.shape[1]
    length = block_length(activation, width)
    if length is None:
        usable = jit.refusal(activation.device, activation.dtype) is None
        other = triton_patch_sites_in_place if usable else torch_patch_sites_in_place
        return other.patch_sites_(activation, table, values, mode, is_checked)
    if not is_checked:
        table = table.detach().to("cpu", torch.int64)
        flat_sites(table, activation.shape[:width], distinct=True)
    n_sites, block = len(table), activation.shape[width:]
    if n_sites == 0 or length == 0:
        return None
    refuse_shared_places(activation)
    sites = starts(table, [stride // length for stride in activation.stride()[:width]])
    places = sites
    site_stride = step = n_samples = sample_stride = 0
    if values is not None:
        values = apart(values.detach(), activation).to(activation.dtype)
        if mode == "mean":
            values = values.contiguous()
            places = starts(table[:, 1:], [s // length for s in values.stride()[1:width]])
            site_stride, step = length, 1
            n_samples, sample_stride = len(values), values[0].numel()
        else:
            # A view where the broadcast allows it: one vector for all sites is not repeated.
            values = values.expand(n_sites, *block).reshape(n_sites, length)
            site_stride, step = values.stride()
    # One copy to the GPU for both.
    indices = torch.stack([sites, places]).to(activation.device)
    with compiled.on_device(activation):
        compiled.launchers().patch_sites(
            activation.data_ptr(),
            indices[0].data_ptr(),
            indices[1].data_ptr(),
            0 if values is None else values.data_ptr(),
            n_sites,
            length,
            site_stride,
            step,
            n_samples,
            sample_stride,
            compiled.MODES[mode],
            compiled.DTYPES[activation.dtype],
            compiled.stream(activation),
        )
    return None


def block_length(activation: Tensor, width: int) -> int | None:
    """Numbers in a site's block, if each starts a multiple of that many from the first; else None.

    A block itself must be without gaps.
    """
    block, strides = activation.shape[width:], activation.stride()
    axes = merged(block, [strides[width:]])
    if len(axes) > 1 or (axes and axes[0][1] != (1,)):
        return None
    length = block.numel()
    leading = zip(activation.shape[:width], strides[:width], strict=True)
    if length and any(n > 1 and stride % length for n, stride in leading):
        return None
    return length


KERNEL = Kernel(
    "patch_sites_",
    "CUDA C++ patch_sites_",
    patch_sites_,
    compiled.refuses,
    priority=20,
    is_opaque=True,
)
