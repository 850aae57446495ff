"""What the tests of Triton kernels have in common."""

import importlib.util

import pytest

NEEDS_TRITON = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
]
