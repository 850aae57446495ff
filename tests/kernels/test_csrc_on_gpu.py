"""The compiled kernels on a GPU, if there is one: the specification, bit for bit where exact."""

import pytest
import torch

from fastlens.kernels import compiled, reference
from fastlens.kernels.cuda_capture import capture
from fastlens.kernels.cuda_capture_int8 import capture_int8
from fastlens.kernels.cuda_dequantize import dequantize
from fastlens.kernels.cuda_patch_sites import patch_sites
from fastlens.kernels.cuda_patch_sites_in_place import patch_sites_
from fastlens.kernels.reference_packed import FORMATS
from tests.close import assert_no_worse

DTYPES = list(compiled.DTYPES)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or compiled.module() is None,
        reason="no GPU, or csrc/ was not built",
    ),
]


def activation(dtype: torch.dtype, d: int = 129) -> torch.Tensor:
    """``[3, 50, 4, d]`` on the CPU, sliced out of something larger and transposed."""
    return torch.randn(50, 3, 4, d + 3).transpose(0, 1)[..., 2 : d + 2].to(dtype)


def table(n: int) -> torch.Tensor:
    return torch.stack(torch.unravel_index(torch.randperm(600)[:n], (3, 50, 4)), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", compiled.MODES)
@pytest.mark.parametrize("d", [1, 64, 129, 1000])
def test_patch_sites(dtype, mode, d):
    x, sites = activation(dtype, d), table(333)
    values = torch.randn(333, d).to(dtype)
    if mode == "mean":
        values = torch.randn(7, 50, 4, d).to(dtype)
    given = None if mode == "zero" else values
    expected = reference.patch_sites(x, sites, given, mode)
    on_gpu = None if given is None else given.cuda()
    found = patch_sites(x.cuda(), sites, on_gpu, mode).cpu()
    if mode == "mean":
        truth = reference.patch_sites(x.double(), sites, values.double(), mode)
        assert_no_worse(found, expected, truth)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("is_on_gpu", [True, False])
def test_patch_sites_in_place(dtype, is_contiguous, is_on_gpu):
    x, sites = activation(dtype), table(333)
    x = x.contiguous() if is_contiguous else x
    values = torch.randn(333, 129).to(dtype)
    expected = reference.patch_sites(x, sites, values, "add")
    patched = x.cuda()
    patch_sites_(patched, sites.cuda() if is_on_gpu else sites, values.cuda(), "add", is_on_gpu)
    assert torch.equal(patched.cpu(), expected)


@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_capture(of, to):
    x, sites = activation(of), table(333)
    assert torch.equal(capture(x.cuda(), sites, to).cpu(), reference.capture(x, sites, to))


@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 63, 1000])
def test_capture_int8(of, d):
    x = activation(of, d)
    x[0, 0, 0, 0], x[1, 1] = torch.nan, 0.0
    for sites in (table(333), torch.zeros(1, 0, dtype=torch.long)):
        values, scale = capture_int8(x.cuda(), sites)
        expected_values, expected_scale = reference.capture_int8(x, sites)
        assert torch.equal(values.cpu(), expected_values)
        assert torch.equal(scale.cpu().nan_to_num(), expected_scale.nan_to_num())


def test_capture_int8_of_more_rows_than_blocks():
    x = torch.randn(70_000, 33)
    values, scale = capture_int8(x.cuda(), torch.zeros(1, 0, dtype=torch.long))
    expected_values, expected_scale = reference.capture_int8(x, torch.zeros(1, 0, dtype=torch.long))
    assert torch.equal(values.cpu(), expected_values) and torch.equal(scale.cpu(), expected_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed_as", FORMATS)
def test_dequantize(dtype, packed_as):
    if packed_as == "int8":
        packed, scale = torch.randint(-127, 128, (57, 129), dtype=torch.int8), torch.rand(57)
    else:
        n_bytes = 5 * FORMATS[packed_as].n_bytes
        packed, scale = torch.randint(0, 60, (57, n_bytes), dtype=torch.uint8), None
    on_gpu = None if scale is None else scale.cuda()
    found = dequantize(packed.cuda(), on_gpu, packed_as, dtype)
    assert torch.equal(found.cpu(), reference.dequantize(packed, scale, packed_as, dtype))
