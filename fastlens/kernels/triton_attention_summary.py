"""Entropy and masses of attention rows in one pass over the keys, in Triton. Not run on a GPU."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.kernels import reference_attention
from fastlens.kernels.jit import launch, power_of_two, refusal
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule, KeyGroup
from fastlens.kernels.triton_attention import (
    LARGEST_D_HEAD,
    added,
    added_strides,
    numbers,
    switches,
)

# (bytes of an element, BLOCK_D) -> BLOCK_M, BLOCK_N, num_warps, num_stages. None spills registers
# on sm_80, sm_90, sm_100 or gfx942, by triton 3.7.1 or by 3.9.0, with every switch or only causal
# (tests/gpu/test_ahead_of_time.py); none was timed.
BLOCKS = {
    (2, 16): (64, 16, 4, 2),
    (2, 32): (64, 32, 4, 2),
    (2, 64): (64, 64, 4, 2),
    (2, 128): (64, 32, 4, 2),
    (2, 256): (64, 16, 8, 1),
    (4, 16): (64, 16, 4, 2),
    (4, 32): (64, 16, 4, 2),
    (4, 64): (32, 32, 8, 2),
    (4, 128): (32, 16, 8, 1),
    (4, 256): (16, 16, 8, 1),
}
# Groups that one launch sums over; more take more launches.
GROUPS_PER_LAUNCH = 2
OFFSET_BLOCK = 4096  # elements of K that a program of `offset_mass_kernel` holds


def attention_summary(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    heads: Sequence[int] | None = None,
    offsets: Sequence[int] = (),
    groups: Sequence[KeyGroup] = (),
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
    lse: Float[Tensor, "batch head query_pos"] | None = None,
) -> tuple[
    Float[Tensor, "batch kept_head query_pos"],
    Float[Tensor, "n_offsets batch kept_head query_pos"],
    Float[Tensor, "n_groups batch kept_head query_pos"],
]:
    """Entropy, mass on offsets and mass on groups: see `fastlens.ops.attention_summary`.

    The keys are read once for the entropy and two groups, and once more for every further two;
    nothing of size ``query_pos x key_pos`` is held. An offset is one product a row, given the
    log-sum-exp.

    Args:
        lse: Of these scores, if it is known; else it is found in the same pass.
    """
    batch, n_queries, n_heads, d_head = q.shape
    if d_head > LARGEST_D_HEAD:
        return reference_attention.attention_summary(
            q, k, rule, heads, offsets, groups, offset, key_mask, bias
        )
    kept = torch.tensor(range(n_heads) if heads is None else heads, dtype=torch.int64)
    kept = kept.to(q.device)
    shape = batch, len(kept), n_queries
    entropy = torch.empty(shape, dtype=torch.float32, device=q.device)
    offset_mass = torch.empty(len(offsets), *shape, dtype=torch.float32, device=q.device)
    group_mass = torch.empty(len(groups), *shape, dtype=torch.float32, device=q.device)
    if not entropy.numel():
        return entropy, offset_mass, group_mass
    has_lse = lse is not None
    if lse is None:
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    else:
        lse = lse[:, kept].contiguous()
    block_d = max(16, power_of_two(d_head))
    block_m, block_n, num_warps, num_stages = BLOCKS[q.element_size(), block_d]
    rest = (
        *added(q, rule, key_mask, bias),
        *q.stride(),
        *k.stride(),
        *added_strides(key_mask, bias),
        *(batch, len(kept)),
        *numbers(q, k, rule, offset),
    )
    compiled = {
        **switches(rule, max(k.shape[1], offset + n_queries), key_mask, bias),
        "D_HEAD": d_head,
        "BLOCK_D": block_d,
    }
    n_programs = -(-n_queries // block_m) * batch * len(kept)
    for first in range(0, max(1, len(groups)), GROUPS_PER_LAUNCH):
        some = groups[first : first + GROUPS_PER_LAUNCH]
        launch(
            *("attention_summary", "attention_summary_kernel", (n_programs,), q.device),
            *(q, k, kept, lse, None if first else entropy),
            *(group_mass[first : first + len(some)] if some else None, *_labels(some, q.device)),
            *rest,
            **compiled,
            HAS_LSE=has_lse,
            N_GROUPS=len(some),
            STRICT=sum(group.strict << g for g, group in enumerate(some)),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_G=power_of_two(len(some)),
            num_warps=num_warps,
            num_stages=num_stages,
        )
        has_lse = True
    if offsets:
        rows = max(1, OFFSET_BLOCK // block_d)
        n_programs = -(-n_queries // rows) * batch * len(kept) * len(offsets)
        at = torch.tensor(list(offsets), dtype=torch.int64).to(q.device)
        launch(
            *("attention_summary", "offset_mass_kernel", (n_programs,), q.device),
            *(q, k, kept, lse, at, offset_mass),
            *rest,
            **compiled,
            BLOCK_M=rows,
            num_warps=4,
        )
    return entropy, offset_mass, group_mass


def _labels(
    groups: Sequence[KeyGroup], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Of queries ``[group, batch, query_pos]`` and of keys, int64: labels may be large."""
    if not groups:
        return None, None
    kinds = zip(*(group[:2] for group in groups), strict=True)
    queries, keys = (
        torch.stack([labels.to(device, torch.int64) for labels in kind]) for kind in kinds
    )
    return queries, keys


KERNEL = Kernel(
    "attention_summary",
    "triton attention_summary",
    attention_summary,
    refusal,
    priority=20,
    is_opaque=True,
)
