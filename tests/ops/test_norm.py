"""The public norm ops."""

import torch

from fastlens.kernels import reference
from fastlens.ops.norm import layer_norm, rms_norm
from tests.close import assert_close_to

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)) * 4
W, B = torch.rand(16), torch.rand(16)


def test_norms_equal_the_specification():
    x, w, b = X.double(), W.double(), B.double()
    assert_close_to(layer_norm(X, W, B), reference.layer_norm(x, w, b, 1e-5), atol=2e-6)
    assert_close_to(layer_norm(X), reference.layer_norm(x, None, None, 1e-5), atol=2e-6)
    assert_close_to(rms_norm(X, W), reference.rms_norm(x, w, 1e-5), atol=2e-6)
    assert_close_to(rms_norm(X, eps=1e-2), reference.rms_norm(x, None, 1e-2), atol=2e-6)
