"""Patching, capturing and unpacking by every kernel that the device has: the very bits."""

import pytest
import torch

from benchmarks.cuda_site_cases import random_blocks
from fastlens.errors import SiteError
from fastlens.kernels import reference
from fastlens.kernels.reference_packed import FORMATS
from fastlens.ops.capture import capture, capture_int8
from fastlens.ops.dequantize import dequantize
from fastlens.ops.patch_sites import MODES, patch_sites, patch_sites_
from tests.close import assert_no_worse
from tests.on_gpu.kernels import DTYPES, SIZES, families, placed

each_dtype = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
each_strides = pytest.mark.parametrize("strides", ["whole", "sliced", "transposed"])
pytestmark = pytest.mark.usefixtures("poison_empty")
LENGTHS = (3, 50, 4)


def table(n: int) -> torch.Tensor:
    return torch.stack(torch.unravel_index(torch.randperm(600)[:n], LENGTHS), 1)


def activation(device, dtype, d, strides):
    return placed(torch.randn(*LENGTHS, d), strides, device, dtype)


@each_dtype
@each_strides
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("is_in_place", [False, True])
def test_patch_sites(device, dtype, strides, mode, d, is_in_place):
    x, sites = activation(device, dtype, d, strides), table(333)
    shape = (7, *LENGTHS[1:], d) if mode == "mean" else (333, d)
    values = None if mode == "zero" else torch.randn(shape).to(device, dtype)
    on_cpu = None if values is None else values.cpu()
    expected = reference.patch_sites(x.cpu(), sites, on_cpu, mode)
    truth = reference.patch_sites(
        x.cpu().double(), sites, None if on_cpu is None else on_cpu.double(), mode
    )
    op = "patch_sites_" if is_in_place else "patch_sites"
    for name, kernels in families([op], device, dtype):
        found = [placed(x.cpu(), strides, device, dtype) for _ in range(2)]
        with kernels:
            if is_in_place:
                patch_sites_(found[0], sites, values, mode)
                patch_sites_(found[1], sites.to(device), values, mode, is_checked=True)
            else:
                found = [patch_sites(x, sites, values, mode)]
        for one in found:
            if mode == "mean":
                assert_no_worse(one, expected, truth, name=name)
            else:
                assert torch.equal(one.cpu(), expected), name


@pytest.mark.parametrize("bad", [[3, 0, 0], [0, -1, 0]])
def test_a_site_outside_is_refused_before_anything_is_launched(device, bad):
    x = activation(device, torch.float32, 8, "whole")
    sites = torch.tensor([[0, 0, 0], bad])
    before = x.clone()
    for _, kernels in families(["patch_sites", "patch_sites_", "capture"], device, x.dtype):
        with kernels:
            with pytest.raises(SiteError, match="outside"):
                patch_sites(x, sites, torch.ones(8, device=device))
            with pytest.raises(SiteError, match="outside"):
                patch_sites_(x, sites, torch.ones(8, device=device))
            with pytest.raises(SiteError, match="outside"):
                capture(x, sites)
    assert torch.equal(x, before)


@each_dtype
@each_strides
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_capture(device, dtype, strides, to, d):
    x, sites = activation(device, dtype, d, strides), table(333)
    expected = reference.capture(x.cpu(), sites, to)
    for name, kernels in families(["capture"], device, dtype):
        with kernels:
            assert torch.equal(capture(x, sites, to).cpu(), expected), name
            assert torch.equal(
                capture(x[..., :3], [1, None, [0, 2]]).cpu(), x[1][:, [0, 2], :3].cpu()
            )


@each_dtype
@each_strides
@pytest.mark.parametrize("d", SIZES)
def test_capture_int8(device, dtype, strides, d):
    x = activation(device, dtype, d, strides)
    x[0, 0, 0, 0], x[1, 1, 1, -1], x[2, 2] = torch.nan, torch.inf, 0.0
    for sites in (table(333), torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 0]])):
        values, scale = reference.capture_int8(x.cpu(), sites)
        for name, kernels in families(["capture_int8"], device, dtype):
            with kernels:
                found = capture_int8(x, sites)
            assert torch.equal(found.values.cpu(), values), name
            assert torch.equal(found.scale.cpu().nan_to_num(-1), scale.nan_to_num(-1)), name


@each_dtype
@pytest.mark.parametrize("packed_as", FORMATS)
@pytest.mark.parametrize("rows", [1, 129])
def test_dequantize(device, dtype, packed_as, rows):
    packed, scale = random_blocks(packed_as, rows, 96)
    expected = reference.dequantize(packed, scale, packed_as, dtype)
    on_device = None if scale is None else scale.to(device)
    for name, kernels in families(["dequantize"], device, dtype):
        with kernels:
            found = dequantize(packed.to(device), packed_as, on_device, dtype)
        assert torch.equal(found.cpu(), expected), name


@pytest.mark.parametrize("mode", MODES)
def test_gradients_pass(device, mode):
    """Against float64 on the CPU by the same op: copies are exact."""
    x, sites = torch.randn(*LENGTHS, 5), table(40)
    shape = (7, *LENGTHS[1:], 5) if mode == "mean" else (40, 5)
    values = None if mode == "zero" else torch.randn(shape)

    def gradients(where, dtype):
        leaves = [None if v is None else v.to(where, dtype).requires_grad_() for v in (x, values)]
        out = patch_sites(leaves[0], sites, leaves[1], mode)
        captured = capture(out, sites[:7])
        loss = (out * out).sum() + captured.sum()
        return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])

    expected = gradients("cpu", torch.float64)
    for name, kernels in families(["patch_sites", "capture"], device, torch.float32):
        with kernels:
            found = gradients(device, torch.float32)
        for one, want in zip(found, expected, strict=True):
            assert (one.double().cpu() - want).abs().max() <= 1e-5 * (1 + want.abs().max()), name
