"""The specification: every op in plain PyTorch, as its formula reads.

The ops on tables of sites and on packed weights stand in `reference_sites`, `reference_packed`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.kernels.reference_attention import attention as attention
from fastlens.kernels.reference_attention import attention_lse as attention_lse
from fastlens.kernels.reference_attention import attention_pattern as attention_pattern
from fastlens.kernels.reference_attention import attention_pattern_rows as attention_pattern_rows
from fastlens.kernels.reference_attention import attention_scores as attention_scores
from fastlens.kernels.reference_attention import attention_summary as attention_summary
from fastlens.kernels.reference_attention import attention_with_pattern as attention_with_pattern
from fastlens.kernels.reference_attention import pattern_of as pattern_of
from fastlens.kernels.reference_attention import score_rows as score_rows
from fastlens.kernels.reference_norm import norm as norm
from fastlens.kernels.reference_packed import dequantize as dequantize
from fastlens.kernels.reference_sites import capture as capture
from fastlens.kernels.reference_sites import capture_int8 as capture_int8
from fastlens.kernels.reference_sites import patch_sites as patch_sites
from fastlens.kernels.reference_sites import patch_sites_ as patch_sites_
from fastlens.kernels.reference_suffix import suffix_attention as suffix_attention


def layer_norm(
    x: Float[Tensor, "... d"],
    w: Float[Tensor, " d"] | None,
    b: Float[Tensor, " d"] | None,
    eps: float,
) -> Float[Tensor, "... d"]:
    """``(x - mean) / sqrt(var + eps) * w + b`` over the last axis, biased variance."""
    centred = x - x.mean(-1, keepdim=True)
    normalized = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return _affine(normalized, w, b)


def rms_norm(
    x: Float[Tensor, "... d"], w: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "... d"]:
    """``x / sqrt(mean(x^2) + eps) * w`` over the last axis."""
    return _affine(x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt(), w, None)


def _affine(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    x = x if w is None else x * w
    return x if b is None else x + b


def rotary(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "#batch pos rotary_dim"],
    sin: Float[Tensor, "#batch pos rotary_dim"],
    adjacent_pairs: bool,
) -> Float[Tensor, "batch pos head d_head"]:
    """``x * cos + turned(x) * sin`` on the first ``rotary_dim`` channels (Su et al. 2104.09864)."""
    rotary_dim = cos.shape[-1]
    turning, passing = x[..., :rotary_dim], x[..., rotary_dim:]
    if adjacent_pairs:
        turned = torch.stack([-turning[..., 1::2], turning[..., ::2]], -1).flatten(-2)
    else:
        first, second = turning.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    rotated = turning * cos[:, :, None] + turned * sin[:, :, None]
    return torch.cat([rotated, passing], -1)
