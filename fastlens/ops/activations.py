"""Activation functions by TransformerLens' names."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlens.errors import ConfigError, did_you_mean


def gelu_new(x: Tensor) -> Tensor:
    """GELU by tanh, as GPT-2: ``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``."""
    return F.gelu(x, approximate="tanh")


def gelu_fast(x: Tensor) -> Tensor:
    """GELU by tanh with ``sqrt(2/pi)`` rounded to 0.7978845608 (Hugging Face's ``gelu_fast``)."""
    if x.dtype == torch.float64:
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))
    # The rounding is below what 32 bits resolve.
    return F.gelu(x, approximate="tanh")


def solu(x: Tensor) -> Tensor:
    """``x * softmax(x)`` over neurons (Elhage et al. 2022); ``solu_ln``'s norm is the MLP's."""
    return x * torch.softmax(x, -1)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``; x itself where ``cap <= 0``."""
    return x if cap is None or cap <= 0 or math.isinf(cap) else cap * torch.tanh(x / cap)


_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "solu": solu,
    "solu_ln": solu,
}


def activation(name: str | None):
    """The function of that name (``cfg.act_fn``)."""
    if name not in _ACTIVATIONS:
        raise ConfigError(f"no activation {name!r}.{did_you_mean(str(name), _ACTIVATIONS)}")
    return _ACTIVATIONS[name]
