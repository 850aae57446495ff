"""Random weights: TransformerLens' schemes, drawn in its order, so that seeds agree bit for bit.

Parameters are strided, and random numbers fill memory in order: each is drawn into a contiguous
temporary and copied.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

NamedParameters = Iterable[tuple[str, Tensor]]


def fans(parameter: Tensor) -> tuple[int, int]:
    """Fan-in and fan-out of a weight in TransformerLens' layout: ``[in, out]`` or per head."""
    shape = parameter.shape
    if len(shape) == 1:
        return 1, shape[0]
    if len(shape) == 2:
        return shape[0], shape[1]
    return shape[1], shape[0] * shape[2]


def gpt2(parameters: NamedParameters, std: float) -> None:
    """Every weight from N(0, std^2) (Radford et al. 2019)."""
    _each(parameters, lambda name, w, draw: draw.normal_(0.0, std))


def xavier(parameters: NamedParameters, gain: float, is_uniform: bool) -> None:
    """Variance ``2 gain^2 / (fan_in + fan_out)`` (Glorot and Bengio 2010)."""

    def fill(name: str, w: Tensor, draw: Tensor) -> None:
        total = sum(fans(w))
        if is_uniform:
            bound = gain * math.sqrt(6.0 / total)
            draw.uniform_(-bound, bound)
        else:
            draw.normal_(0.0, gain * math.sqrt(2.0 / total))

    _each(parameters, fill)


def kaiming(parameters: NamedParameters, gain: float, is_uniform: bool) -> None:
    """Variance ``2 gain^2 / fan_in`` (He et al. 1502.01852), whatever activation comes before."""
    gain *= math.sqrt(2.0)

    def fill(name: str, w: Tensor, draw: Tensor) -> None:
        fan_in = fans(w)[0]
        if is_uniform:
            bound = gain * math.sqrt(3.0 / fan_in)
            draw.uniform_(-bound, bound)
        else:
            draw.normal_(0.0, gain * math.sqrt(1.0 / fan_in))

    _each(parameters, fill)


def mu_p(parameters: NamedParameters, is_uniform: bool) -> None:
    """muP (Yang et al. 2203.03466): standard deviation 1 for embeddings, ``fan_in ** -0.5`` else.

    As in TransformerLens the unembedding counts as an embedding, not ``1 / fan_in``.
    """

    def fill(name: str, w: Tensor, draw: Tensor) -> None:
        scale = 1.0 if "embed" in name else 1 / fans(w)[0] ** 0.5
        if is_uniform:
            bound = scale * 3**0.5
            draw.uniform_(-bound, bound)
        else:
            draw.normal_(0.0, scale)

    _each(parameters, fill)


@torch.no_grad()
def _each(parameters: NamedParameters, fill: Callable[[str, Tensor, Tensor], object]) -> None:
    for name, parameter in parameters:
        if "W_" in name:
            draw = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            fill(name, parameter, draw)
            parameter.copy_(draw)
