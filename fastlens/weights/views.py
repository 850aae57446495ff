"""From Hugging Face's tensors to TransformerLens' axes: views, nothing copied.

``nn.Linear`` weights are ``[out, in]``, which is also how our parameters lie in memory.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlens.components import layout
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, WeightsError


def as_it_is(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """The tensor itself."""
    return tensor


def transposed(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """``[out, in]`` as ``[in, out]``."""
    return tensor.t()


def input_heads(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """``[head * d_head, d_model]`` as ``[head, d_model, d_head]`` (W_Q, W_K, W_V)."""
    return layout.input_heads(tensor, tensor.shape[0] // cfg.d_head)


def output_heads(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """``[d_model, head * d_head]`` as ``[head, d_head, d_model]`` (W_O)."""
    return layout.output_heads(tensor, cfg.n_heads)


def bias_heads(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """``[head * d_head]`` as ``[head, d_head]``."""
    return tensor.view(-1, cfg.d_head)


def first_positions(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """The first ``n_ctx`` rows of a position table."""
    if cfg.n_ctx > tensor.shape[0]:
        raise ConfigError(
            f"n_ctx={cfg.n_ctx} was asked, but this model learned {tensor.shape[0]} positions. "
            f"Ask for at most {tensor.shape[0]}."
        )
    return tensor[: cfg.n_ctx]


def plus_one(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """A norm's gain that is stored as its difference from one (Gemma, Nemotron)."""
    return tensor + 1


def both(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, Tensor]:
    """The same tensor for two parameters: a parallel block whose one norm feeds both branches."""
    return tensor, tensor.clone()


def each_expert(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """``[expert, ...]``: one tensor for each expert."""
    return tensor.unbind()


def gates_and_ups(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """``[expert, gate and up, d_model]``: gate and up projection of each expert in turn."""
    return tuple(part for both in tensor for part in both.chunk(2))


def must_be_zero(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """Nothing, if the tensor is zero everywhere: there is no parameter it could become."""
    if tensor.count_nonzero():
        raise WeightsError(
            "the gate and up projections of this model have biases that are not zero. "
            "TransformerLens' gated MLP has no parameter for them (its b_in is added after the "
            "product), so the model cannot be loaded exactly."
        )
    return ()


def landing(
    parameter: Tensor,
    shape: tuple[int, ...],
    view: Callable[..., Any],
    cfg: HookedTransformerConfig,
    dtype: torch.dtype | None,
) -> Tensor | None:
    """The parameter's own memory as a tensor of the file fills it, so that nothing is copied.

    None where the parameter lies in memory otherwise, or is of another dtype.
    """
    if dtype != parameter.dtype or parameter.device.type not in ("cpu", "meta"):
        return None
    stored = torch.empty(shape, dtype=dtype, device="meta")
    seen = view(stored, cfg)
    same = (
        isinstance(seen, Tensor)
        # What is computed, and no view, has memory of its own.
        and (seen is stored or seen._base is stored)
        and seen.numel() == math.prod(shape)
        and seen.shape == parameter.shape
        and seen.stride() == parameter.stride()
    )
    if not same:
        return None
    strides = torch.empty(shape, device="meta").stride()
    start = parameter.storage_offset() - seen.storage_offset()
    return parameter.detach().as_strided(shape, strides, start)
