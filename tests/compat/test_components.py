"""Factories and types under TransformerLens' names; values: tests/compat/calls/parts.py."""

import pytest
import torch

from fastlens import FactoredMatrix, HookedTransformerConfig
from fastlens.compat.components import ActivationFunctionFactory, MLPFactory, TensorLike
from fastlens.components.mlp import MLP, GatedMLP
from fastlens.components.moe import MoE
from fastlens.components.xielu import XIELU
from fastlens.errors import ConfigError
from tests.configs import tiny


def test_factories_give_our_parts():
    assert type(MLPFactory.create_mlp(HookedTransformerConfig(**tiny("gpt2")))) is MLP
    assert type(MLPFactory.create_mlp(HookedTransformerConfig(**tiny("llama")))) is GatedMLP
    assert type(MLPFactory.create_mlp(HookedTransformerConfig(**tiny("moe")))) is MoE
    cfg = HookedTransformerConfig(**tiny("gpt2", act_fn="xielu"))
    assert isinstance(ActivationFunctionFactory.pick_activation_function(cfg), XIELU)
    cfg.act_fn = "gelo"
    with pytest.raises(ConfigError, match="Nearest: 'gelu'"):
        ActivationFunctionFactory.pick_activation_function(cfg)


def test_what_a_factor_may_be():
    assert isinstance(torch.ones(2, 3), TensorLike)
    assert not isinstance("text", TensorLike)
    assert not isinstance(FactoredMatrix(torch.ones(2, 3), torch.ones(3, 2)), str)
