"""Attention sinks: a learned score that takes part in every row's softmax and mixes no value."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastlens.errors import ConfigError, GradientError
from fastlens.kernels.attention_gradients import attention_gradients
from fastlens.kernels.masks import AttentionRule
from fastlens.ops.attention import attention, attention_with_lse


def attention_with_sinks(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    sinks: Float[Tensor, " head"],
    rule: AttentionRule,
    offset: int = 0,
    key_mask: Bool[Tensor, "#batch key_pos"] | None = None,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """`fastlens.ops.attention.attention` with one more score a head in every row's softmax.

    A row's weights are ``exp(scores) / (exp(sink) + sum(exp(scores)))``, and sum to less than one
    (GPT-OSS, OpenAI 2025). It is attention times ``sigmoid(lse - sink)``, so nothing is held that
    attention does not hold.

    Args:
        sinks: In nats, one for each query head.

    Numerics: as attention; the factor in float32 at least. Differentiable in q, k, v and sinks, not
    in ``bias``.
    Cost: attention; its gradient is twice attention's. With ``create_graph=True`` all scores are
    held.
    Raises: ConfigError for a soft-cap, which no model has together with sinks; GradientError if
        ``bias`` wants a gradient.
    """
    if rule.soft_cap > 0:
        raise ConfigError(
            f"attention sinks and a soft-cap of {rule.soft_cap} were asked together. That gradient "
            f"is not written; set attn_scores_soft_cap=-1."
        )
    if torch.is_grad_enabled() and bias is not None and bias.requires_grad:
        raise GradientError(
            "attention with sinks passes no gradient on to bias, and bias requires one. Detach it, "
            "or call this under torch.no_grad()."
        )
    inputs = (q, k, v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        z, lse = _WithLse.apply(*inputs, rule, offset, key_mask, bias)
    else:
        z, lse = attention_with_lse(q, k, v, rule, offset, key_mask, bias)
    return z * share_of_keys(lse.transpose(1, 2), sinks).to(z.dtype)


def share_of_keys(
    lse: Float[Tensor, "*rows head"], sinks: Float[Tensor, " head"]
) -> Float[Tensor, "*rows head one"]:
    """What part of a row's weight the keys keep beside the sink: ``sigmoid(lse - sink)``."""
    return torch.sigmoid(lse - sinks.to(lse))[..., None]


def pattern_from(
    scores: Float[Tensor, "*rows key_pos"], sinks: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "*rows key_pos"]:
    """Softmax of scores, beside a sink if there is one; zeros for a row that sees no key.

    Args:
        sinks: One for each row, as its leading axes broadcast.
    """
    if sinks is not None:
        sink = sinks.to(scores)[..., None].expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    pattern = torch.softmax(scores, -1)
    return pattern.masked_fill(pattern.isnan(), 0.0)


class _WithLse(torch.autograd.Function):
    """Attention and its log-sum-exp, both differentiable."""

    @staticmethod
    def forward(ctx, q, k, v, rule, offset, key_mask, bias):  # type: ignore[no-untyped-def]
        z, lse = attention_with_lse(q, k, v, rule, offset, key_mask, bias)
        ctx.save_for_backward(q, k, v, key_mask, bias)
        ctx.rule, ctx.offset = rule, offset
        return z, lse

    @staticmethod
    def backward(ctx, grad_z, grad_lse):  # type: ignore[no-untyped-def]
        q, k, v, key_mask, bias = ctx.saved_tensors
        rest = ctx.rule, ctx.offset, key_mask, bias
        of_z = attention_gradients(q, k, v, *rest, grad_z)
        # d lse / d score is the pattern: a mixture of keys for q, and the other way round for k.
        to_lse = (grad_lse.transpose(1, 2) / ctx.rule.scale)[..., None].to(q.dtype)
        to_q, to_k = of_z.q, of_z.k
        if ctx.needs_input_grad[0] and to_q is not None:
            to_q = to_q + attention(q, k, k, *rest) * to_lse
        if ctx.needs_input_grad[1] and to_k is not None:
            # An alias: its gradient is that of the values alone, where one is recorded.
            of_lse = attention_gradients(q, k, k.view_as(k), *rest, q * to_lse).v
            to_k = to_k if of_lse is None else to_k + of_lse
        return to_q, to_k, of_z.v, None, None, None, None
