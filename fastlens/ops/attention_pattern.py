"""Attention patterns of chosen heads and query rows, and attention with a pattern given."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.errors import GradientError, ShapeError
from fastlens.kernels.attention_gradients import row_gradients
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.sites import check_table, flat_sites
from fastlens.ops.attention_inputs import check_floats, check_heads, checked_mask, indices_of
from fastlens.ops.dispatch import is_opaque, kernel_for


def attention_pattern(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    heads: Sequence[int] | Int[Tensor, " kept_head"] | None = None,
    rows: Sequence[int] | Int[Tensor, " kept_row"] | None = None,
    offset: int = 0,
    key_mask: Bool[Tensor, "#batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
    lse: Float[Tensor, "batch head query_pos"] | None = None,
    scores: bool = False,
) -> Float[Tensor, "batch kept_head kept_row key_pos"]:
    """The weights with which chosen query rows of chosen heads mix the values, and no others.

    ``softmax(mask(cap(q . k / scale) + alibi + bias))``; with ``scores`` what the softmax is taken
    of, in nats, minus infinity where a key is not visible.

    Args:
        q, k, rule, offset, key_mask, bias: As in `fastlens.ops.attention.attention`, for all heads
            and rows.
        heads, rows: Indices of the query heads and query rows wanted, in that order; negative ones
            count from the end. None is all. Row i stands at absolute position ``offset + i``.
        lse: The log-sum-exp of these same scores, if it is known (`attention_with_lse` gives it):
            weights are then ``exp(score - lse)``. Without it each row is divided by its own sum,
            which costs a pass and is free of the rounding of ``lse`` (6e-8 of it in float32).

    Returns: In the dtype of q. A row that sees no key is zeros (minus infinity for scores).

    Numerics: scores and sums in float32 for 16-bit inputs, rounded once. Differentiable in q, k and
    bias (the softmax's gradient also where ``lse`` is given); what is kept for the backward is the
    result alone.
    Cost: ``2 * d_head`` FLOPs a weight. Beside the result, blocks of at most 512 query rows of the
    chosen heads; neither q, k nor scores of other heads are touched.
    Raises: ShapeError for an index outside or what is no index (a mask of truth values, a
        fraction), and for what does not fit, as in `fastlens.ops.attention.attention`.
    """
    key_mask = checked_mask(q, k, None, rule, offset, key_mask, bias, lse)
    heads = None if heads is None else indices_of(heads, q.shape[2], "head")
    rows = None if rows is None else indices_of(rows, q.shape[1], "query row")
    kernel = kernel_for("attention_pattern", q.device.type, q.dtype)
    return kernel(q, k, rule, heads, rows, offset, key_mask, bias, lse, scores)


def attention_pattern_rows(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    sites: Int[Tensor, "site 3"],
    offset: int = 0,
    key_mask: Bool[Tensor, "#batch key_pos"] | None = None,
    lse: Float[Tensor, "batch head query_pos"] | None = None,
    scores: bool = False,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> Float[Tensor, "site key_pos"]:
    """Any set of single rows of the pattern: `attention_pattern` where they form no rectangle.

    Args:
        sites: (example, head, query row) of each row wanted; rows may repeat. On the CPU by
            preference: one on a GPU is checked by copying it back, which waits for the GPU.
        q, k, rule, offset, key_mask, bias, lse, scores: As in `attention_pattern`.

    Returns: float32 (float64 for float64), whatever the dtype of q.

    Numerics: scores and sums in the dtype of the result. Differentiable in q and k (the softmax's
    gradient also where ``lse`` is given), not in bias.
    Cost: ``2 * d_head`` FLOPs a weight; beside the result, the keys of one KV head of one example.
    On CUDA a Triton kernel is taken if FASTLENS_TRITON=1 (not run on a GPU).
    Raises: SiteError for an index below 0 or past the end; GradientError for a bias that asks for a
        gradient; ShapeError for sites that are no integers, and as in `attention_pattern`.
    """
    key_mask = checked_mask(q, k, None, rule, offset, key_mask, bias, lse)
    check_table(sites, 3)
    if sites.shape[1] != 3:
        raise ShapeError(
            f"sites are [site, 3], each (example, head, query row); got {list(sites.shape)}."
        )
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise GradientError(
            "attention_pattern_rows passes no gradient to bias, and bias asks for one. Detach it, "
            "or call attention_pattern."
        )
    return torch.ops.fastlens.attention_pattern_rows(
        q, k, sites, *rule, offset, key_mask, lse, scores, bias
    )


def attention_with_pattern(
    pattern: Float[Tensor, "batch head query_pos key_pos"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    heads: Sequence[int] | Int[Tensor, " head"] | None = None,
    n_heads: int | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """``pattern @ v``: what attention gives if its weights are these.

    So an edited pattern of a few heads takes effect while the others stay fused.

    Args:
        pattern: Not normalised again: rows may sum to anything.
        heads: Which query heads the pattern's are; None is all, in order.
        n_heads: How many query heads there are in all, by which a query head finds its values; to
            be given with ``heads``.

    Returns: In the dtype of v, for the pattern's heads in their order.

    Numerics: one matrix product, summed in float32 for 16-bit inputs. Differentiable in both.
    Cost: ``2 * d_head`` FLOPs a weight. Values are not repeated for the query heads of a group.
    Raises: ShapeError for heads, a batch or keys that do not fit.
    """
    if (
        pattern.ndim != 4
        or v.ndim != 4
        or pattern.shape[0] != v.shape[0]
        or pattern.shape[3] != v.shape[1]
    ):
        raise ShapeError(
            f"a pattern is [batch, head, query_pos, key_pos] and v [batch, key_pos, kv_head, "
            f"d_head], of one batch and as many keys; got {list(pattern.shape)} and "
            f"{list(v.shape)}."
        )
    check_floats(v)
    if heads is None:
        check_heads(pattern.shape[1], v.shape[2])
    else:
        if n_heads is None:
            raise ShapeError(
                f"a pattern of heads {heads} needs n_heads, the number of all query heads: "
                f"it says which of the {v.shape[2]} heads of values each of them reads."
            )
        check_heads(n_heads, v.shape[2])
        heads = indices_of(heads, n_heads, "head")
        if len(heads) != pattern.shape[1]:
            raise ShapeError(f"{len(heads)} heads were named for a pattern of {pattern.shape[1]}.")
    if is_opaque("attention_with_pattern", v.device.type, v.dtype):
        return torch.ops.fastlens.attention_with_pattern(pattern, v, heads, n_heads)
    kernel = kernel_for("attention_with_pattern", v.device.type, v.dtype)
    return kernel(pattern, v, heads, n_heads)


# -- the ops that compilers see --------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastlens", "FRAGMENT")
# The fields of an AttentionRule stand in their order.
_LIBRARY.define(
    "attention_pattern_rows(Tensor q, Tensor k, Tensor sites, float scale, bool causal, "
    "int? window, float soft_cap, bool alibi, SymInt offset, Tensor? key_mask, Tensor? lse, "
    "bool scores, Tensor? bias) -> Tensor"
)
_LIBRARY.define(
    "attention_with_pattern(Tensor pattern, Tensor v, int[]? heads, int? n_heads) -> Tensor"
)


def _rows(
    q: Tensor, k: Tensor, sites: Tensor, scale: float, causal: bool, window: int | None,
    soft_cap: float, alibi: bool, offset: int, key_mask: Tensor | None, lse: Tensor | None,
    scores: bool, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    flat_sites(sites, (q.shape[0], q.shape[2], q.shape[1]))
    rule = AttentionRule(scale, causal, window, soft_cap, alibi)
    kernel = kernel_for("attention_pattern_rows", q.device.type, q.dtype)
    return kernel(q, k, rule, sites.long(), offset, key_mask, lse, scores, bias)


def _rows_fake(q: Tensor, k: Tensor, sites: Tensor, *rest: object) -> Tensor:
    dtype = torch.promote_types(torch.float32, q.dtype)
    return q.new_empty((sites.shape[0], k.shape[1]), dtype=dtype)


def _rows_context(ctx, inputs, output) -> None:
    q, k, sites, *rule, offset, key_mask, _, scores, bias = inputs
    ctx.save_for_backward(q, k, sites, key_mask, bias, output)
    ctx.rest = AttentionRule(*rule), offset, scores


def _rows_backward(ctx, grad: Tensor):
    q, k, sites, key_mask, bias, pattern = ctx.saved_tensors
    rule, offset, scores = ctx.rest
    sites = sites.to(q.device).long()
    grads = row_gradients(q, k, rule, sites, offset, key_mask, bias, pattern, grad, scores)
    return grads.q, grads.k, *(None,) * 11


def _mixed(pattern: Tensor, v: Tensor, heads: list[int] | None, n_heads: int | None) -> Tensor:
    kernel = kernel_for("attention_with_pattern", v.device.type, v.dtype)
    return kernel(pattern, v, heads, n_heads).contiguous()


def _mixed_fake(pattern: Tensor, v: Tensor, heads: list[int] | None, n_heads: int | None) -> Tensor:
    batch, n_kept, n_queries, _ = pattern.shape
    return v.new_empty((batch, n_queries, n_kept, v.shape[-1]))


def _mixed_context(ctx, inputs, output) -> None:
    pattern, v, ctx.heads, ctx.n_heads = inputs
    ctx.save_for_backward(pattern, v)


def _mixed_backward(ctx, grad: Tensor):
    """Through the product again, as PyTorch knows it."""
    pattern, v = ctx.saved_tensors
    heads, group = range(pattern.shape[1]), pattern.shape[1] // v.shape[2]
    if ctx.heads is not None:
        heads, group = ctx.heads, ctx.n_heads // v.shape[2]
    read = torch.tensor([head // group for head in heads], device=v.device)
    grad = grad.transpose(1, 2)
    to_pattern = to_v = None
    if ctx.needs_input_grad[0]:
        to_pattern = grad @ v.index_select(2, read).permute(0, 2, 3, 1)
        to_pattern = to_pattern.to(pattern.dtype)
    if ctx.needs_input_grad[1]:
        of_heads = pattern.to(grad.dtype).transpose(2, 3) @ grad  # [batch, head, key_pos, d_head]
        to_v = torch.zeros_like(v).index_add(2, read, of_heads.transpose(1, 2))
    return to_pattern, to_v, None, None


_LIBRARY.impl("attention_pattern_rows", _rows, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_with_pattern", _mixed, "CompositeExplicitAutograd")
torch.library.register_fake("fastlens::attention_pattern_rows", _rows_fake, lib=_LIBRARY)
torch.library.register_fake("fastlens::attention_with_pattern", _mixed_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "fastlens::attention_pattern_rows", _rows_backward, setup_context=_rows_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "fastlens::attention_with_pattern", _mixed_backward, setup_context=_mixed_context, lib=_LIBRARY
)
