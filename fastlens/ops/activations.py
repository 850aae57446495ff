"""Activation functions by TransformerLens' names."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlens.errors import ConfigError, did_you_mean


def gelu_new(input: Tensor) -> Tensor:
    """GELU by tanh, as GPT-2: ``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``."""
    return F.gelu(input, approximate="tanh")


def gelu_pytorch_tanh(input: Tensor) -> Tensor:
    """GELU by tanh, which is what `gelu_new` computes."""
    return F.gelu(input, approximate="tanh")


def gelu_fast(input: Tensor) -> Tensor:
    """GELU by tanh with ``sqrt(2/pi)`` rounded to 0.7978845608 (Hugging Face's ``gelu_fast``)."""
    x = input
    if x.dtype == torch.float64:
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))
    # The rounding is below what 32 bits resolve.
    return F.gelu(x, approximate="tanh")


def relu2(input: Tensor) -> Tensor:
    """``relu(x)^2`` (So et al. 2109.08668)."""
    return F.relu(input).square()


def solu(input: Tensor) -> Tensor:
    """``x * softmax(x)`` over neurons (Elhage et al. 2022); ``solu_ln``'s norm is the MLP's."""
    return input * torch.softmax(input, -1)


def xielu(input: Tensor) -> Tensor:
    """xIELU (Huang and Schlag, 2411.13010) with its untrained slopes, 0.8 and 0.8; beta is 0.5.

    `fastlens.components.xielu.XIELU` is the one with trained slopes.
    """
    x = input
    below = (torch.expm1(x.clamp(max=-1e-6)) - x) * 0.8 + 0.5 * x
    return torch.where(x > 0, 0.8 * x * x + 0.5 * x, below)


def softcap_enabled(cap: float | int | None) -> bool:
    """Whether there is a soft cap: None, 0 and negative numbers say there is none."""
    return cap is not None and cap > 0


def soft_cap(x: Tensor, cap: float | int | None) -> Tensor:
    """``cap * tanh(x / cap)``; x itself where there is no cap, or an infinite one."""
    if cap is None or not softcap_enabled(cap) or math.isinf(cap):
        return x
    return cap * torch.tanh(x / cap)


SUPPORTED_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "gelu_pytorch_tanh": gelu_pytorch_tanh,
    "solu": solu,
    "solu_ln": solu,
    "xielu": xielu,
    "relu2": relu2,
}


def activation(name: str | None):
    """The function of that name (``cfg.act_fn``)."""
    if name not in SUPPORTED_ACTIVATIONS:
        near = did_you_mean(str(name), SUPPORTED_ACTIVATIONS)
        raise ConfigError(f"no activation {name!r}.{near}")
    return SUPPORTED_ACTIVATIONS[name]
