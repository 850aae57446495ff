"""Random weights: TransformerLens' schemes, drawn in its order, so that seeds agree bit for bit.

Parameters are strided, and random numbers fill memory in order: each is drawn into a contiguous
temporary and copied.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.errors import ShapeError, WeightsError

NamedParameters = Iterable[tuple[str, Tensor]]

NonlinearityType: TypeAlias = Literal[
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "sigmoid", "tanh", "relu", "leaky_relu", "selu",
]  # fmt: skip


def calc_fan_in_and_fan_out(tensor: Float[Tensor, "..."]) -> tuple[int, int]:
    """Fan-in and fan-out of a weight in TransformerLens' layout.

    ``[out]`` counts as fed by one number; ``[in, out]``; ``[head, d_model, d_head]`` is
    ``d_model`` in, ``head * d_head`` out.

    Raises: ShapeError for a scalar or more than three axes.
    """
    shape = tensor.shape
    if len(shape) == 1:
        return 1, shape[0]
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) == 3:
        return shape[1], shape[0] * shape[2]
    raise ShapeError(
        f"fan-in and fan-out are those of a bias, a matrix or one matrix a head; got "
        f"{tuple(shape)}."
    )


def init_xavier_uniform_(
    param: Float[Tensor, "..."], gain: float | int = 1.0
) -> Float[Tensor, "..."]:
    """Fill in place from U(-b, b), ``b = gain sqrt(6 / (fan_in + fan_out))`` (Glorot and Bengio
    2010). The same seed gives the same values whatever the strides."""
    bound = gain * math.sqrt(6.0 / sum(calc_fan_in_and_fan_out(param)))
    return _fill(param, lambda draw: draw.uniform_(-bound, bound))


def init_xavier_normal_(
    param: Float[Tensor, "..."], gain: float | int = 1.0
) -> Float[Tensor, "..."]:
    """Fill in place from a normal distribution of variance ``2 gain^2 / (fan_in + fan_out)``."""
    std = gain * math.sqrt(2.0 / sum(calc_fan_in_and_fan_out(param)))
    return _fill(param, lambda draw: draw.normal_(0.0, std))


def init_kaiming_uniform_(
    param: Float[Tensor, "..."],
    a: float | int = 0,
    nonlinearity: NonlinearityType = "relu",
    gain: float | int = 1.0,
    mode: str = "fan_in",
) -> Float[Tensor, "..."]:
    """Fill in place from U(-b, b), ``b = gain c sqrt(3 / fan)`` (He et al. 1502.01852).

    Args:
        a: Negative slope of ``"leaky_relu"``; others do not look at it.
        nonlinearity: What comes before the weight; gives ``c`` (``sqrt(2)`` for ReLU, 1 for
            linear), by torch's `nn.init.calculate_gain`.
        mode: The fan: ``"fan_in"`` or ``"fan_out"``.

    Raises: WeightsError for another mode.
    """
    bound = gain * nn.init.calculate_gain(nonlinearity, a) * math.sqrt(3.0 / _fan(param, mode))
    return _fill(param, lambda draw: draw.uniform_(-bound, bound))


def init_kaiming_normal_(
    param: Float[Tensor, "..."],
    a: float | int = 0,
    nonlinearity: NonlinearityType = "relu",
    gain: float | int = 1.0,
    mode: str = "fan_in",
) -> Float[Tensor, "..."]:
    """Fill in place from a normal distribution of variance ``(gain c)^2 / fan``.

    Arguments and errors are those of `init_kaiming_uniform_`.
    """
    std = gain * nn.init.calculate_gain(nonlinearity, a) * math.sqrt(1.0 / _fan(param, mode))
    return _fill(param, lambda draw: draw.normal_(0.0, std))


def gpt2(parameters: NamedParameters, std: float) -> None:
    """Every weight from N(0, std^2) (Radford et al. 2019)."""
    for _, w in _weights(parameters):
        _fill(w, lambda draw: draw.normal_(0.0, std))


def xavier(parameters: NamedParameters, gain: float, is_uniform: bool) -> None:
    """Every weight by `init_xavier_uniform_` or `init_xavier_normal_`."""
    for _, w in _weights(parameters):
        (init_xavier_uniform_ if is_uniform else init_xavier_normal_)(w, gain)


def kaiming(parameters: NamedParameters, gain: float, is_uniform: bool) -> None:
    """Every weight by `init_kaiming_uniform_` or `init_kaiming_normal_`, as if after a ReLU."""
    for _, w in _weights(parameters):
        (init_kaiming_uniform_ if is_uniform else init_kaiming_normal_)(w, gain=gain)


def mu_p(parameters: NamedParameters, is_uniform: bool) -> None:
    """muP (Yang et al. 2203.03466): standard deviation 1 for embeddings, ``fan_in ** -0.5`` else.

    As in TransformerLens the unembedding counts as an embedding, not ``1 / fan_in``.
    """
    for name, w in _weights(parameters):
        std = 1.0 if "embed" in name else 1 / calc_fan_in_and_fan_out(w)[0] ** 0.5
        bound = std * 3**0.5
        if is_uniform:
            _fill(w, lambda draw, bound=bound: draw.uniform_(-bound, bound))
        else:
            _fill(w, lambda draw, std=std: draw.normal_(0.0, std))


def _weights(parameters: NamedParameters) -> Iterable[tuple[str, Tensor]]:
    # ".W" is what TransformerLens calls the matrices of BERT's heads.
    return ((n, parameter) for n, parameter in parameters if "W_" in n or n.endswith(".W"))


def _fan(param: Tensor, mode: str) -> int:
    fan_in, fan_out = calc_fan_in_and_fan_out(param)
    if mode not in ("fan_in", "fan_out"):
        raise WeightsError(f"mode={mode!r} must be 'fan_in' or 'fan_out'.")
    return fan_in if mode == "fan_in" else fan_out


@torch.no_grad()
def _fill(param: Tensor, fill: Callable[[Tensor], object]) -> Tensor:
    draw = torch.empty(param.shape, dtype=param.dtype, device=param.device)
    fill(draw)
    return param.copy_(draw)
