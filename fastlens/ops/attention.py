"""Attention, fused: values mixed by the softmax of scores that are never held all at once."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.kernels.attention_gradients import attention_gradients
from fastlens.kernels.masks import AttentionRule, with_lengths
from fastlens.ops.attention_inputs import check_lengths, checked_mask, widened
from fastlens.ops.dispatch import is_opaque, kernel_for


def attention(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_value"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "#batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
    key_lengths: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch query_pos head d_value"]:
    """``softmax(mask(cap(q . k / scale) + alibi + bias)) @ v``, without the pattern.

    Args:
        q: Queries; row i stands at absolute position ``offset + i``.
        k, v: Keys and values from position 0 on. Query head h reads KV head
            ``h // (head / kv_head)``; they are not expanded. Values may be narrower than keys: the
            work is then as if zeros stood behind them.
        rule: Scale, causality, window (1 or more), soft-cap, ALiBi.
        offset: 0 or more.
        key_mask: False where a key is padding; one row may stand for all examples. A query row that
            sees no key gives zeros.
        bias: Added to the scores (nats), after soft-cap and ALiBi; minus infinity hides a key. Any
            strides: expand one that queries share.
        key_lengths: How many keys of each example count, from the front; the rest is padding.

    Numerics: softmax statistics in float32 for 16-bit inputs. Differentiable in q, k, v and bias;
    a row that sees no key has no gradient.
    Cost: ``4 * d_head`` FLOPs a visible pair of query and key. Where a mask or bias is needed, one
    mask of at most 512 query rows at a time. On CUDA a Triton kernel is taken if FASTLENS_TRITON=1
    (not run on a GPU); its gradient is made in blocks of query rows.
    Raises: ShapeError for heads that are no multiple of the KV heads, any other shapes that do not
        fit, numbers that are not floating-point, an offset below 0, a window below 1.
    """
    if 0 < v.shape[-1] < k.shape[-1]:
        wide = widened(v, k)
        z = attention(q, k, wide, rule, offset, key_mask, bias, key_lengths)
        return z[..., : v.shape[-1]]
    key_mask = checked_mask(q, k, v, rule, offset, key_mask, bias)
    if key_lengths is not None:
        check_lengths(key_lengths, q.shape[0])
        key_mask = with_lengths(key_mask, key_lengths, k.shape[1])
    device = q.device.type
    kernel = kernel_for("attention", device, q.dtype)
    if is_opaque("attention", device, q.dtype):
        return torch.ops.fastlens.attention(q, k, v, *rule, offset, key_mask, bias)[0]
    return kernel(q, k, v, rule, offset, key_mask, bias)


def attention_with_lse(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_value"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "#batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
    key_lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch query_pos head d_value"], Float[Tensor, "batch head query_pos"]]:
    """`attention`, and the log-sum-exp of each row's scores.

    ``lse = log(sum(exp(scores)))`` over the visible keys. With it any row of the pattern is
    ``exp(scores - lse)`` (`fastlens.ops.attention_pattern`), and outputs over disjoint keys are
    merged, each weighted by ``exp(its lse - the lse of all)``.

    Returns: ``z`` as `attention` gives it, and the log-sum-exp in nats: float32 (float64 for
    float64), minus infinity for a row that sees no key.

    Arguments, numerics, cost and errors as `attention`. The log-sum-exp carries no gradient.
    On the CPU it comes from PyTorch's fused kernel; with a soft-cap, or while a gradient of
    ``bias`` is recorded, scores are made a second time for it, in blocks of query rows.
    """
    if 0 < v.shape[-1] < k.shape[-1]:
        wide = widened(v, k)
        z, lse = attention_with_lse(q, k, wide, rule, offset, key_mask, bias, key_lengths)
        return z[..., : v.shape[-1]], lse
    key_mask = checked_mask(q, k, v, rule, offset, key_mask, bias)
    if key_lengths is not None:
        check_lengths(key_lengths, q.shape[0])
        key_mask = with_lengths(key_mask, key_lengths, k.shape[1])
    device = q.device.type
    kernel = kernel_for("attention_lse", device, q.dtype)
    if is_opaque("attention_lse", device, q.dtype):
        return torch.ops.fastlens.attention(q, k, v, *rule, offset, key_mask, bias)
    z, lse = kernel(q, k, v, rule, offset, key_mask, bias)
    return z, lse.detach()


# -- the op that compilers see ---------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastlens", "FRAGMENT")
# The fields of an AttentionRule stand in their order.
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, int? window, "
    "float soft_cap, bool alibi, SymInt offset, Tensor? key_mask, Tensor? bias) "
    "-> (Tensor z, Tensor lse)"
)


def _run(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None,
    soft_cap: float, alibi: bool, offset: int, key_mask: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rule = AttentionRule(scale, causal, window, soft_cap, alibi)
    kernel = kernel_for("attention_lse", q.device.type, q.dtype)
    z, lse = kernel(q, k, v, rule, offset, key_mask, bias)
    return z.contiguous(), lse.contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(
        (q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(torch.float32, q.dtype)
    )
    return q.new_empty(q.shape), lse


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *rule, offset, key_mask, bias = inputs
    ctx.save_for_backward(q, k, v, key_mask, bias)
    ctx.rule, ctx.offset = AttentionRule(*rule), offset
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_z: Tensor | None, grad_lse: Tensor | None):
    if grad_z is None:
        return (None,) * 11
    q, k, v, key_mask, bias = ctx.saved_tensors
    grads = attention_gradients(
        q, k, v, ctx.rule, ctx.offset, key_mask, bias, grad_z, ctx.needs_input_grad[10]
    )
    return grads.q, grads.k, grads.v, *(None,) * 7, grads.bias


_LIBRARY.impl("attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastlens::attention", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "fastlens::attention", _backward, setup_context=_setup_context, lib=_LIBRARY
)
