"""The specification of the ops on tables of sites: patch some vectors, capture some vectors."""

import math

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from fastlens.kernels.sites import flat_sites

# The smallest normal float32: smaller scales lose digits, and some GPUs' kernels flush them.
TINY = torch.finfo(torch.float32).tiny


def patch_sites(
    activation: Float[Tensor, "*axes"],
    table: Int[Tensor, "site width"],
    values: Float[Tensor, "*values"] | None,
    mode: str,
) -> Float[Tensor, "*axes"]:
    """A copy with ``x[site]`` made ``v``, ``x + v``, ``x * v``, 0, or the mean of ``v`` there."""
    lengths, block = activation.shape[: table.shape[1]], activation.shape[table.shape[1] :]
    flat = flat_sites(table, lengths, distinct=True).to(activation.device)
    out = activation.clone(memory_format=torch.contiguous_format)
    blocks = out.view(math.prod(lengths), *block)
    if mode == "zero":
        return blocks.index_fill_(0, flat, 0.0).view(activation.shape)
    assert values is not None
    v = values.to(activation.dtype)
    if mode == "mean":
        places = flat_sites(table[:, 1:], lengths[1:]).to(v.device)
        v = v.reshape(len(v), math.prod(lengths[1:]), *block)[:, places].mean(0)
    elif mode == "add":
        v = blocks[flat] + v
    elif mode == "scale":
        v = blocks[flat] * v
    blocks[flat] = v.expand(len(flat), *block)
    return out


def patch_sites_(
    activation: Float[Tensor, "*axes"],
    table: Int[Tensor, "site width"],
    values: Float[Tensor, "*values"] | None,
    mode: str,
    is_checked: bool,
) -> None:
    """As `patch_sites`, written into the activation itself; checks whatever ``is_checked`` says."""
    activation.copy_(patch_sites(activation, table, values, mode))


def capture(
    activation: Float[Tensor, "*axes"], table: Int[Tensor, "site width"], dtype: torch.dtype
) -> Float[Tensor, "site ..."]:
    """``activation[site].to(dtype)``, stacked; a table of width 0 names the whole activation."""
    width = table.shape[1]
    flat_sites(table, activation.shape[:width])
    if width == 0:
        whole = activation.expand(len(table), *activation.shape)
        return whole.to(dtype, memory_format=torch.contiguous_format, copy=True)
    index = tuple(table.to(activation.device, torch.int64).unbind(1))
    return activation[index].to(dtype).contiguous()


def capture_int8(
    activation: Float[Tensor, "*axes"], table: Int[Tensor, "site width"]
) -> tuple[Int8[Tensor, "site ..."], Float[Tensor, "site ..."]]:
    """``round(x / scale)`` with ``scale = max|x| / 127`` over the last axis, both in float32.

    A row that holds NaN or infinity has scale NaN and values 0; one whose scale would be below
    the smallest normal float32 has scale 0 and values 0.
    """
    x = capture(activation, table, torch.float32)
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    # A NaN compares false, so it is not mistaken for a tiny row.
    scale = (largest / 127).masked_fill(largest < 127 * TINY, 0.0)
    scale = scale.masked_fill(~largest.isfinite(), torch.nan)
    quotient = x / scale[..., None]
    is_kept = (scale > 0)[..., None]
    values = quotient.round().clamp(-127, 127).masked_fill(~is_kept, 0.0)
    return values.to(torch.int8), scale
