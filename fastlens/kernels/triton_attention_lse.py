"""Attention with the log-sum-exp of its scores, in Triton. Not run on a GPU."""

from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.kernels import torch_attention_lse
from fastlens.kernels.jit import refusal
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.triton_attention import LARGEST_D_HEAD, forward


def attention_lse(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> tuple[Float[Tensor, "batch query_pos head d_head"], Float[Tensor, "batch head query_pos"]]:
    """See `fastlens.ops.attention.attention_with_lse`; no gradient here."""
    if q.shape[-1] > LARGEST_D_HEAD:
        return torch_attention_lse.attention_lse(q, k, v, rule, offset, key_mask, bias)
    return forward(q, k, v, rule, offset, key_mask, bias)


KERNEL = Kernel(
    "attention_lse",
    "triton attention with log-sum-exp",
    attention_lse,
    refusal,
    priority=20,
    is_opaque=True,
)
