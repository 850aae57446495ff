"""Values mixed by a given pattern: one matrix product for each head of values."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.kernels.kernel import Kernel
from fastlens.kernels.score_blocks import kept, shared_kv_heads


def attention_with_pattern(
    pattern: Float[Tensor, "batch head query_pos key_pos"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    heads: Sequence[int] | None = None,
    n_heads: int | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """See `fastlens.ops.attention_pattern.attention_with_pattern`."""
    if heads is None:
        heads, n_heads = range(pattern.shape[1]), pattern.shape[1]
    group = 1 if n_heads is None else n_heads // v.shape[2]
    kv_heads, each = shared_kv_heads(heads, group)
    values = kept(v, 2, kv_heads).transpose(1, 2)  # [batch, kv_head, key_pos, d_head]
    # Query heads that read the same values become rows of one product.
    joint = pattern.to(v.dtype).unflatten(1, (len(kv_heads), each)).flatten(2, 3)
    return (joint @ values).view(*pattern.shape[:3], v.shape[-1]).transpose(1, 2)


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel("attention_with_pattern", "torch matmul", attention_with_pattern, _refuses, 10)
