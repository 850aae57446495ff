"""Other values in a parameter, for a while, against TransformerLens."""

import pytest
import torch
import torch.nn as nn

from fastlens.compat.utilities.parameter_swap import temporarily_swap_parameter

COMPARED = ["transformer_lens.utilities.parameter_swap.temporarily_swap_parameter"]


@pytest.mark.tl
def test_as_transformer_lens(theirs):
    for swap in (temporarily_swap_parameter, theirs("parameter_swap").temporarily_swap_parameter):
        parameter = nn.Parameter(torch.randn(3, 2).T)
        before, stride, grad = parameter.detach().clone(), parameter.stride(), torch.ones(2, 3)
        parameter.grad = grad
        with swap(parameter, torch.zeros(2, 3)) as held:
            assert held is parameter and not held.any()
        assert torch.equal(parameter, before) and parameter.stride() == stride
        with pytest.raises(KeyboardInterrupt), swap(parameter, torch.zeros(2, 3)):
            raise KeyboardInterrupt
        assert torch.equal(parameter, before) and parameter.grad is grad
        for wrong, error in (
            ((before, before), TypeError),
            ((parameter, parameter), TypeError),
            ((parameter, [0.0]), TypeError),
            ((parameter, torch.zeros(3, 2)), ValueError),
            ((parameter, torch.zeros(2, 3).double()), ValueError),
        ):
            with pytest.raises(error), swap(*wrong):
                pass
        assert torch.equal(parameter, before)


def test_the_message():
    with (
        pytest.raises(ValueError, match=r"the shape of the parameter.*\[2, 3\].*\[3, 2\]"),
        temporarily_swap_parameter(nn.Parameter(torch.zeros(2, 3)), torch.zeros(3, 2)),
    ):
        pass
