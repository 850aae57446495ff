"""Attention, fused: values mixed by the softmax of scores that are never held all at once."""

from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.kernels.masks import AttentionRule
from fastlens.ops.dispatch import kernel_for


def attention(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """``softmax(mask(cap(q . k / scale) + alibi)) @ v``, without the pattern.

    Args:
        q: Queries; row i stands at absolute position ``offset + i``.
        k, v: Keys and values from position 0 on. Query head h reads KV head
            ``h // (head / kv_head)``; they are not expanded.
        rule: Scale, causality, window, soft-cap, ALiBi.
        key_mask: False where a key is padding. A query row that sees no key gives zeros.

    Numerics: softmax statistics in float32 for 16-bit inputs. Differentiable in q, k and v.
    Cost: where a mask is needed, one mask of at most 512 query rows at a time.
    """
    return kernel_for("attention", q.device.type, q.dtype)(q, k, v, rule, offset, key_mask)
