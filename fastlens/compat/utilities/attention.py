"""The linear maps of attention per head, and OLMo's clamp."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.components.layout import from_input_heads, linear


def simple_attn_linear(
    input: Float[Tensor, "batch pos d_model"],
    w: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """``input @ w + b`` in every head; the weights are moved to the device of ``input``."""
    w, b = w.to(input.device), b.to(input.device)
    return linear(input, from_input_heads(w), b.flatten()).unflatten(-1, b.shape)


def complex_attn_linear(
    input: Float[Tensor, "batch pos head d_model"],
    w: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """``input @ w + b`` where every head has an input of its own."""
    return torch.einsum("bphm,hmd->bphd", input, w) + b


def clamp_qkv(
    q: Float[Tensor, "..."], k: Float[Tensor, "..."], v: Float[Tensor, "..."], clip: float | int
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Each clamped to ``[-clip, clip]`` (``clip_qkv`` of OLMo and MPT); nothing works in place."""
    return q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip)
