"""Where heads look, in numbers: entropy, mass on chosen keys, largest weights; no pattern held."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.masks import KeyGroup as KeyGroup
from fastlens.kernels.score_blocks import ScoreBlocks, softmax
from fastlens.ops.attention_inputs import checked_mask, indices_of
from fastlens.ops.dispatch import is_opaque, kernel_for


class AttentionSummary(NamedTuple):
    """What `attention_summary` found of each query row; zeros for a row that sees no key.

    Attributes:
        entropy: Of the weights, in nats: 0 if all is on one key, log(n) if n share it evenly.
        offset_mass: Weight on the key that many positions before the query.
        group_mass: Weight on the keys that have the query's label.
        top_weights: The largest weights, largest first.
        top_keys: Their absolute positions. Where a row sees fewer keys: weight 0, key -1.
    """

    entropy: Float[Tensor, "batch head row"]
    offset_mass: Float[Tensor, "n_offsets batch head row"]
    group_mass: Float[Tensor, "n_groups batch head row"]
    top_weights: Float[Tensor, "batch head row top_k"]
    top_keys: Int[Tensor, "batch head row top_k"]


@torch.no_grad()
def attention_summary(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    *,
    heads: Sequence[int] | Int[Tensor, " kept_head"] | None = None,
    offsets: Sequence[int] = (),
    groups: Sequence[KeyGroup] = (),
    top_k: int = 0,
    offset: int = 0,
    key_mask: Bool[Tensor, "#batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> AttentionSummary:
    """Entropy, mass on chosen keys and largest weights of every query row of the pattern A.

    * entropy: ``-sum_j A[i, j] log A[i, j]``;
    * mass on an offset o: ``A[i, i - o]`` in absolute positions, 0 where there is no such key;
    * mass on a group: the sum of ``A[i, j]`` over keys j whose label is the query's.

    A previous-token head has its mass on offset 1. A duplicate-token head has it on the group whose
    labels are the tokens; an induction head on the group whose query labels are the tokens and
    whose key labels are the tokens one position earlier (-1 for the first) (Olsson et al.
    2209.11895).

    Args:
        q, k, rule, offset, key_mask, bias: As in `fastlens.ops.attention.attention`.
        heads: Indices of the query heads wanted, in that order; negative ones count from the end.
            None is all.
        offsets: Positions back from the query; negative ones look ahead.
        groups: Labels of queries and keys. A negative query label is in no group; ``strict`` leaves
            out the query's own position.
        top_k: How many of the largest weights.

    Numerics: float32 (float64 for float64) throughout. Not differentiable: `attention_pattern` is.
    Cost: ``2 * d_head`` FLOPs a visible weight, twice that with ``top_k``; nothing larger than a
    block of at most 512 query rows is held. On CUDA a Triton kernel makes all but the largest
    weights if FASTLENS_TRITON=1 (not run on a GPU).
    Raises: ShapeError for an index outside, a ``top_k`` below 0, labels that are not one for each
        query and key, and what does not fit, as in `fastlens.ops.attention.attention`.
    """
    key_mask = checked_mask(q, k, None, rule, offset, key_mask, bias)
    if top_k < 0:
        raise ShapeError(f"top_k={top_k} is a number of weights: 0 for none, or more.")
    heads = None if heads is None else indices_of(heads, q.shape[2], "head")
    for number, group in enumerate(groups):
        found = tuple(group.query_labels.shape), tuple(group.key_labels.shape)
        wanted = tuple(q.shape[:2]), tuple(k.shape[:2])
        if found != wanted:
            raise ShapeError(
                f"group {number} has labels {list(found[0])} and {list(found[1])} for queries and "
                f"keys; there are {list(wanted[0])} and {list(wanted[1])}."
            )
    if is_opaque("attention_summary", q.device.type, q.dtype):
        found = torch.ops.fastlens.attention_summary(
            *(q, k, *rule, heads, list(offsets)),
            *([group.query_labels for group in groups], [group.key_labels for group in groups]),
            *([group.strict for group in groups], offset, key_mask, bias),
        )
    else:
        kernel = kernel_for("attention_summary", q.device.type, q.dtype)
        found = kernel(q, k, rule, heads, offsets, groups, offset, key_mask, bias)
    blocks = ScoreBlocks(q, k, rule, heads, None, offset, key_mask, bias)
    entropy, on_offsets, on_groups = found
    return AttentionSummary(entropy, on_offsets, on_groups, *_largest(blocks, top_k))


def _largest(blocks: ScoreBlocks, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest weights and their keys, by the scores: a visible key may have weight 0."""
    shape, device = (*blocks.shape[:3], top_k), blocks.q.device
    weights = torch.zeros(shape, dtype=blocks.dtype, device=device)
    keys = torch.full(shape, -1, dtype=torch.int64, device=device)
    for block in blocks if top_k else ():
        n = min(top_k, block.keys.stop - block.keys.start)
        if not n:
            continue
        scores = blocks.scores(block)
        best, column = scores.topk(n, -1)
        is_key = best > -torch.inf
        pattern = softmax(scores, blocks.can_be_blind)
        weights[:, :, block.rows, :n] = pattern.gather(-1, column)
        keys[:, :, block.rows, :n] = torch.where(is_key, column + block.keys.start, -1)
    return weights, keys


# -- the op that compilers see ---------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastlens", "FRAGMENT")
# The fields of an AttentionRule, and those of the groups, stand in their order.
_LIBRARY.define(
    "attention_summary(Tensor q, Tensor k, float scale, bool causal, int? window, float soft_cap, "
    "bool alibi, int[]? heads, int[] offsets, Tensor[] query_labels, Tensor[] key_labels, "
    "bool[] strict, SymInt offset, Tensor? key_mask, Tensor? bias) "
    "-> (Tensor entropy, Tensor offset_mass, Tensor group_mass)"
)


def _run(
    q: Tensor, k: Tensor, scale: float, causal: bool, window: int | None, soft_cap: float,
    alibi: bool, heads: list[int] | None, offsets: list[int], query_labels: list[Tensor],
    key_labels: list[Tensor], strict: list[bool], offset: int, key_mask: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rule = AttentionRule(scale, causal, window, soft_cap, alibi)
    groups = [KeyGroup(*group) for group in zip(query_labels, key_labels, strict, strict=True)]
    kernel = kernel_for("attention_summary", q.device.type, q.dtype)
    return kernel(q, k, rule, heads, offsets, groups, offset, key_mask, bias)


def _fake(
    q: Tensor, k: Tensor, scale: float, causal: bool, window: int | None, soft_cap: float,
    alibi: bool, heads: list[int] | None, offsets: list[int], query_labels: list[Tensor],
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(torch.float32, q.dtype)
    shape = (q.shape[0], q.shape[2] if heads is None else len(heads), q.shape[1])
    numbers = (), (len(offsets),), (len(query_labels),)
    entropy, on_offsets, on_groups = (q.new_empty((*n, *shape), dtype=dtype) for n in numbers)
    return entropy, on_offsets, on_groups


_LIBRARY.impl("attention_summary", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastlens::attention_summary", _fake, lib=_LIBRARY)
