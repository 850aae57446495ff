"""Activations against their formulas in float64."""

import math

import pytest
import torch

from fastlens.components.xielu import XIELU
from fastlens.config import ACTIVATIONS
from fastlens.errors import ConfigError
from fastlens.ops.activations import (
    SUPPORTED_ACTIVATIONS,
    activation,
    soft_cap,
    softcap_enabled,
)
from tests.close import assert_close_to

X = torch.linspace(-6, 6, 101, dtype=torch.float64)
FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu_new": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "gelu_fast": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
    "gelu_pytorch_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "solu": lambda x: x * torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "xielu": lambda x: torch.where(
        x > 0, 0.8 * x**2 + 0.5 * x, 0.8 * (torch.exp(x.clamp(max=-1e-6)) - 1 - x) + 0.5 * x
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_activation_equals_its_formula(name, dtype):
    atol = 1e-12 if dtype == torch.float64 else 2e-6
    # Two grow as the square: beside the floor, a few roundings of the value itself.
    rtol = 0.0 if dtype == torch.float64 else 2e-7
    assert_close_to(activation(name)(X.to(dtype)), FORMULAS[name](X), atol=atol, rtol=rtol)


def test_soft_cap():
    assert soft_cap(X, -1.0) is X
    assert_close_to(soft_cap(X, 3.0), 3 * torch.tanh(X / 3), atol=1e-12)
    assert softcap_enabled(3) and not any(map(softcap_enabled, (None, 0, -1.0)))


def test_every_name_of_a_config_is_there():
    assert set(ACTIVATIONS) == set(SUPPORTED_ACTIVATIONS)


def test_xielu_is_the_module_before_training():
    # The module's parameters are float32.
    assert_close_to(activation("xielu")(X), XIELU().double()(X), atol=1e-7, rtol=1e-7)


def test_a_typo_has_near_names():
    with pytest.raises(ConfigError, match="'gelu_new'"):
        activation("gelu_nwe")
