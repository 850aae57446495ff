"""The norm with its statistics, by hand."""

import pytest
import torch

from fastlens.kernels.reference_norm import norm, statistics_dtype
from tests.close import assert_close_to


def test_by_hand():
    x = torch.tensor([[1.0, 3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 8.0]])
    w, b = torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 5.0, 0.0])
    out, mean, scale = norm(x, w, b, 0.0, True)
    assert mean.tolist() == [[2.0], [2.0]]
    assert_close_to(scale, [[1.0], [12**0.5]])
    assert_close_to(out[0], [-1.0, 2.0, 4.0, 1.0])
    out, mean, scale = norm(x, None, None, 11.0, False)
    assert mean.numel() == 0
    assert_close_to(scale, [[4.0], [27**0.5]])
    assert_close_to(out[0], [0.25, 0.75, 0.25, 0.75])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_at_least_float32(dtype):
    wide = statistics_dtype(dtype)
    assert wide == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Squares that float16 cannot hold, and a variance that 16 bits would lose beside the mean.
    x = (300 + torch.randn(4, 1000)).to(dtype)
    out, mean, scale = norm(x, None, None, 1e-5, True)
    assert (out.dtype, mean.dtype, scale.dtype) == (dtype, wide, wide)
    x = x.double()
    assert_close_to(mean, x.mean(-1, keepdim=True), atol=1e-3)
    assert_close_to(scale, x.std(-1, correction=0, keepdim=True), rtol=1e-4)
