"""Attention of many runs of the same prompts, over packed rows that they share."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.errors import GradientError, ShapeError
from fastlens.kernels import torch_suffix_attention
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.spans import Span as Span
from fastlens.ops.attention_inputs import (
    check_branches,
    check_floats,
    check_heads,
    check_mask,
    check_rule,
    is_integer,
    widened,
)
from fastlens.ops.dispatch import is_opaque, kernel_for


def suffix_attention(
    q: Float[Tensor, "row head d_head"],
    k: Float[Tensor, "row kv_head d_head"],
    v: Float[Tensor, "row kv_head d_value"],
    table: Int[Tensor, "branch pos"],
    spans: Sequence[Span],
    rule: AttentionRule,
    key_mask: Bool[Tensor, "branch pos"] | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "out_row head d_value"]:
    """Attention where runs of one prompt hold only the rows in which they differ.

    Branch b at position t stands at packed row ``table[b, t]``, its own or one that it shares with
    other branches, such as the unpatched run's. The query (b, t) attends to the keys
    ``table[b, j]`` of all j that the rule lets position t see: ``softmax(cap(q . k / scale) +
    alibi) @ v``, as `fastlens.ops.attention.attention` over that branch's keys laid out one behind
    another.

    Args:
        q, k, v: Packed rows, any strides. Query head h reads KV head ``h // (head / kv_head)``.
            Values may be narrower than keys: the work is then as if zeros stood behind them.
        table: Integers. A place that no wanted row sees may hold -1.
        spans: The rows that are wanted: of each span's branches, positions ``start .. stop - 1``.
        rule: Scale, causality, window, soft-cap, ALiBi. If not causal, a row sees every column of
            the table.
        key_mask: False where a branch's key is padding. A row that sees no key gives zeros.
        sinks: One more score a head, as in `fastlens.ops.attention_sinks`: keys are then gathered,
            on every device.

    Returns: One row for each span, each of its branches and each of its positions, in this order.

    Numerics: as `fastlens.ops.attention.attention`. Where a long prefix is shared, it and a
    branch's own keys are attended to apart and merged by their log-sum-exp, in float32 (float64 for
    float64): the last bits depend on which branches come together.
    Cost: keys are gathered for some branches at a time, within 24 MB, a shared prefix once for all.
    Kernels for CUDA read keys by the table and gather nothing; they were not run on a GPU.
    Raises: ShapeError for what does not fit, and on the CPU for a branch that the table does not
        have. GradientError if a gradient is wanted: there is none.
        On the CPU a row outside the packed ones raises torch's IndexError; on a GPU it is not
        checked.
    """
    if 0 < v.shape[-1] < k.shape[-1]:
        wide = suffix_attention(q, k, widened(v, k), table, spans, rule, key_mask, sinks)
        return wide[..., : v.shape[-1]]
    _check(q, k, v, table, spans, rule, key_mask)
    if sinks is not None:
        _refuse_gradient(q, k, v)
        return torch_suffix_attention.suffix_attention(
            q, k, v, table, spans, rule, key_mask, sinks.detach()
        )
    kernel = kernel_for("suffix_attention", q.device.type, q.dtype)
    if not is_opaque("suffix_attention", q.device.type, q.dtype):
        _refuse_gradient(q, k, v)
        return kernel(q, k, v, table, spans, rule, key_mask)
    branches = [span.branches for span in spans]
    starts, stops = [span.start for span in spans], [span.stop for span in spans]
    return torch.ops.fastlens.suffix_attention(
        q, k, v, table, branches, starts, stops, key_mask, *rule
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    spans: Sequence[Span],
    rule: AttentionRule,
    key_mask: Tensor | None,
) -> None:
    if (
        q.ndim != 3
        or k.ndim != 3
        or k.shape != v.shape
        or len(q) != len(k)
        or q.shape[2] != k.shape[2]
    ):
        raise ShapeError(
            f"q is [row, head, d_head], k and v are [row, kv_head, d_head] with the same rows; got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    check_heads(q.shape[1], k.shape[1])
    check_floats(q)
    check_rule(rule)
    if table.ndim != 2 or not is_integer(table):
        raise ShapeError(
            f"the table is [branch, pos], integers; got {table.dtype} {list(table.shape)}."
        )
    if key_mask is not None:
        check_mask(key_mask)
        if key_mask.shape != table.shape:
            raise ShapeError(
                f"the key mask is [branch, pos] as the table, {list(table.shape)}; got "
                f"{list(key_mask.shape)}."
            )
    for span in spans:
        check_branches(span.branches, table.shape[0])
        if not 0 <= span.start < span.stop <= table.shape[1]:
            raise ShapeError(
                f"a span is wanted from position {span.start} up to {span.stop}, and the table has "
                f"{table.shape[1]} positions. Let 0 <= start < stop <= {table.shape[1]}."
            )


def _refuse_gradient(*inputs: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise GradientError(
            "suffix_attention passes no gradient on, and q, k or v require one. Call it under "
            "torch.no_grad(), or use fastlens.ops.attention.attention on each run's own keys."
        )


# -- the op that compilers see ---------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastlens", "FRAGMENT")
_LIBRARY.define(
    "suffix_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor[] branches, int[] starts, "
    "int[] stops, Tensor? key_mask, float scale, bool causal, int? window, float soft_cap, "
    "bool alibi) -> Tensor"
)


def _suffix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    branches: Sequence[Tensor],
    starts: Sequence[int],
    stops: Sequence[int],
    key_mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float,
    alibi: bool,
) -> Tensor:
    _refuse_gradient(q, k, v)
    spans = [Span(*span) for span in zip(branches, starts, stops, strict=True)]
    rule = AttentionRule(scale, causal, window, soft_cap, alibi)
    kernel = kernel_for("suffix_attention", q.device.type, q.dtype)
    return kernel(q, k, v, table, spans, rule, key_mask)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    branches: Sequence[Tensor],
    starts: Sequence[int],
    stops: Sequence[int],
    *rest: object,
) -> Tensor:
    lengths = zip(branches, starts, stops, strict=True)
    n_rows = sum(len(some) * (stop - start) for some, start, stop in lengths)
    return q.new_empty(n_rows, q.shape[1], v.shape[2])


_LIBRARY.impl("suffix_attention", _suffix_attention, "CompositeExplicitAutograd")
torch.library.register_fake("fastlens::suffix_attention", _fake, lib=_LIBRARY)
