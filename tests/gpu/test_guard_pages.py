"""Tensors between pages that cannot be touched: equal to what they copy, and fatal to overrun."""

import pytest
import torch

from tests.gpu.guard_pages import guarded, guarded_outputs
from tests.gpu.workers import Died, compiling


@pytest.mark.parametrize("at_start", [False, True])
def test_a_copy_keeps_values_and_strides(at_start):
    for tensor in (
        torch.randn(3, 5),
        torch.randn(4, 6)[1:, ::2],
        torch.randn(3, 4).transpose(0, 1).bfloat16(),
        torch.tensor(2.0),
        torch.zeros(0, 3),
        torch.ones(5000, dtype=torch.bool),
    ):
        copy = guarded(tensor, at_start=at_start)
        assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()


def test_outputs_are_poisoned():
    empty = torch.empty
    with guarded_outputs():
        assert torch.empty(3, 4).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert (torch.empty(2, dtype=torch.int8) == 127).all()
        assert torch.empty(0, 4).shape == (0, 4)
    assert torch.empty is empty


def read(offset, at_start):
    """One element at ``offset`` from the first."""
    import ctypes

    tensor = guarded(torch.ones(10), at_start=at_start)
    return ctypes.c_float.from_address(tensor.data_ptr() + 4 * offset).value


@pytest.mark.kernels
@pytest.mark.parametrize(("offset", "at_start"), [(10, False), (-1, True)])
def test_one_element_too_far_is_fatal(offset, at_start):
    inside = offset - 1 if offset > 0 else offset + 1
    assert compiling(read, offset=inside, at_start=at_start) == 1.0
    with pytest.raises(Died):
        compiling(read, offset=offset, at_start=at_start)
