"""Single rows of the attention pattern, or of the scores, in Triton. Not run on a GPU."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.kernels.jit import launch, power_of_two, refusal
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.triton_attention import added, added_strides, numbers, switches

BLOCK = 4096  # elements of K that a program holds


def attention_pattern_rows(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    sites: Int[Tensor, "site 3"],
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    lse: Float[Tensor, "batch head query_pos"] | None = None,
    scores: bool = False,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> Float[Tensor, "site key_pos"]:
    """See `fastlens.ops.attention_pattern.attention_pattern_rows`.

    Without ``lse`` one launch more finds it, for these rows alone. The registered op has the
    gradient and checks the sites.
    """
    n_keys, n_heads, d_head = k.shape[1], q.shape[2], q.shape[3]
    out = torch.empty(len(sites), n_keys, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    sites = sites.to(q.device, torch.int64).contiguous()
    block_d = power_of_two(d_head)
    block_n = min(128, max(1, BLOCK // block_d))
    extra = added(q, rule, key_mask, bias)
    strides = *q.stride(), *k.stride(), *added_strides(key_mask, bias)
    group_size, n_queries, *rest = numbers(q, k, rule, offset)
    compiled = {
        **switches(rule, max(n_keys, offset + q.shape[1]), key_mask, bias),
        "D_HEAD": d_head,
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "num_warps": 4,
    }
    by_site = lse is None and not scores
    if by_site:
        lse = torch.empty(len(sites), dtype=torch.float32, device=q.device)
        launch(
            *("attention", "row_lse_kernel", (len(sites),), q.device),
            *(q, k, sites, lse, *extra, *strides, group_size, *rest),
            **compiled,
        )
    launch(
        *("attention", "pattern_rows_kernel", (len(sites), -(-n_keys // block_n)), q.device),
        *(q, k, None if lse is None else lse.contiguous(), sites, out, *extra, *strides),
        *(n_heads, group_size, n_queries, *rest),
        **compiled,
        SCORES=scores,
        LSE_BY_SITE=by_site,
    )
    return out


KERNEL = Kernel(
    "attention_pattern_rows",
    "triton rows of the pattern",
    attention_pattern_rows,
    refusal,
    priority=20,
    is_opaque=True,
)
