"""Activations and soft caps by TransformerLens' path, against its own."""

from typing import get_args

import pytest
import torch

from fastlens.compat.utilities import activation_functions as ours
from tests.close import assert_close_to

COMPARED = [
    "transformer_lens.utilities.activation_functions.ActivationFunction",
    "transformer_lens.utilities.activation_functions.SOFTCAP_DISABLED",
    "transformer_lens.utilities.activation_functions.SUPPORTED_ACTIVATIONS",
    "transformer_lens.utilities.activation_functions.XIELU",
    "transformer_lens.utilities.activation_functions.XIELU.forward",
    "transformer_lens.utilities.activation_functions.apply_softcap",
    "transformer_lens.utilities.activation_functions.gelu_fast",
    "transformer_lens.utilities.activation_functions.gelu_new",
    "transformer_lens.utilities.activation_functions.gelu_pytorch_tanh",
    "transformer_lens.utilities.activation_functions.relu2",
    "transformer_lens.utilities.activation_functions.softcap_enabled",
    "transformer_lens.utilities.activation_functions.solu",
    "transformer_lens.utilities.activation_functions.xielu",
]

pytestmark = pytest.mark.tl

X = torch.linspace(-6, 6, 120, dtype=torch.float64).view(2, 3, 20)


@pytest.fixture(scope="module")
def tl(theirs):
    return theirs("activation_functions")


@pytest.mark.parametrize(
    "name", ["gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu2", "solu", "xielu"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_activations(tl, name, dtype):
    x = X.to(dtype)
    before = x.clone()
    found, wanted = getattr(ours, name)(input=x), getattr(tl, name)(input=x)
    assert found.dtype == wanted.dtype and torch.equal(x, before)
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-7, torch.bfloat16: 2e-2}[dtype]
    assert_close_to(found, wanted, atol=tolerance, rtol=tolerance)


def test_the_table(tl):
    assert set(ours.SUPPORTED_ACTIVATIONS) == set(tl.SUPPORTED_ACTIVATIONS)
    for name, function in ours.SUPPORTED_ACTIVATIONS.items():
        assert_close_to(function(X), tl.SUPPORTED_ACTIVATIONS[name](X), atol=1e-12)
    assert get_args(ours.ActivationFunction) == get_args(tl.ActivationFunction)


@pytest.mark.parametrize("cap", [None, -1.0, 0, 2.5, 3])
def test_soft_caps(tl, cap):
    assert ours.softcap_enabled(cap) == tl.softcap_enabled(cap)
    assert torch.equal(ours.apply_softcap(X, cap), tl.apply_softcap(X, cap))
    assert ours.SOFTCAP_DISABLED == tl.SOFTCAP_DISABLED


def test_xielu_as_a_module(tl):
    options = {"alpha_p_init": 1.1, "alpha_n_init": 0.9, "beta_init": 0.4, "eps": -1e-5}
    found, wanted = ours.XIELU(**options), tl.XIELU(**options)
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    found.load_state_dict(tl.XIELU().state_dict())
    x = X.float()
    assert_close_to(found.forward(input=x), tl.XIELU().forward(input=x), atol=1e-6)
