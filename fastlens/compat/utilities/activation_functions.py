"""Activation functions and soft caps, by TransformerLens' path."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from fastlens.components.xielu import XIELU
from fastlens.config import SOFTCAP_OFF
from fastlens.ops.activations import (
    SUPPORTED_ACTIVATIONS,
    gelu_fast,
    gelu_new,
    gelu_pytorch_tanh,
    relu2,
    softcap_enabled,
    solu,
    xielu,
)
from fastlens.ops.activations import soft_cap as apply_softcap

__all__ = [
    "SOFTCAP_DISABLED",
    "SUPPORTED_ACTIVATIONS",
    "XIELU",
    "ActivationFunction",
    "apply_softcap",
    "gelu_fast",
    "gelu_new",
    "gelu_pytorch_tanh",
    "relu2",
    "softcap_enabled",
    "solu",
    "xielu",
]

ActivationFunction: TypeAlias = Callable[..., Tensor]
SOFTCAP_DISABLED: float = SOFTCAP_OFF
