"""Which query may see which key: the rule, and the mask of any block of query rows."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class AttentionRule(NamedTuple):
    """What one attention layer does to its scores, whatever the input.

    Scores are ``q . k / scale``, then ``soft_cap * tanh(score / soft_cap)`` if ``soft_cap > 0``,
    then ``slope * (key - query)`` per head if ALiBi slopes are given (Press et al. 2108.12409),
    then minus infinity where a key is not visible: later than the query if ``causal``, or
    ``window`` or more positions before it.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    soft_cap: float = -1.0
    alibi: bool = False


class KeyGroup(NamedTuple):
    """Which keys count as one group for each query: those with the query's label.

    Attributes:
        query_labels, key_labels: A label of 0 or more, or a negative one for no group.
        strict: Whether a query's own position is left out of its group.
    """

    query_labels: Int[Tensor, "batch query_pos"]
    key_labels: Int[Tensor, "batch key_pos"]
    strict: bool = True


def with_lengths(
    key_mask: Bool[Tensor, "batch key_pos"] | None,
    key_lengths: Int[Tensor, " batch"] | None,
    n_keys: int,
) -> Bool[Tensor, "batch key_pos"] | None:
    """A key mask that also hides all but the first ``key_lengths`` keys of each example."""
    if key_lengths is None:
        return key_mask
    counted = torch.arange(n_keys, device=key_lengths.device) < key_lengths[:, None]
    return counted if key_mask is None else key_mask & counted.to(key_mask.device)


def alibi_slopes(n_heads: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, " head"]:
    """The ALiBi slope of each head (Press et al. 2108.12409).

    For a power of two, ``2 ** (-8 (h + 1) / n_heads)``. For other numbers of heads the series of
    the next lower power of two, then every other slope of the next higher one, as in the paper's
    code, BLOOM and MPT; TransformerLens takes the formula for any number.
    """
    lower = 1 << (n_heads.bit_length() - 1)
    powers = torch.arange(1, lower + 1, device=device, dtype=torch.float64)
    slopes = torch.tensor(2 ** (-8 / lower), device=device, dtype=torch.float64).pow(powers)
    if n_heads > lower:
        odd = torch.arange(1, 2 * (n_heads - lower), 2, device=device, dtype=torch.float64)
        start = torch.tensor(2 ** (-4 / lower), device=device, dtype=torch.float64)
        slopes = torch.cat([slopes, start.pow(odd)])
    return slopes.to(dtype)


def visible_keys(rule: AttentionRule, n_keys: int, first: int, last: int) -> tuple[int, int]:
    """The range of keys that any query at absolute positions ``first .. last - 1`` can see."""
    start = 0 if rule.window is None else max(0, first - rule.window + 1)
    return start, min(n_keys, last) if rule.causal else n_keys


def visibility(
    rule: AttentionRule,
    queries: Tensor,
    keys: Tensor,
    key_mask: Bool[Tensor, "batch key_pos"] | None,
) -> Bool[Tensor, "#batch 1 query_pos key_pos"] | None:
    """True where a key may be attended to; None if every key may.

    Args:
        queries, keys: Absolute positions of the rows and columns wanted.
        key_mask: False for padding, for the same columns.
    """
    visible = None
    if rule.causal:
        visible = keys[None, :] <= queries[:, None]
    if rule.window is not None:
        near = keys[None, :] > queries[:, None] - rule.window
        visible = near if visible is None else visible & near
    if visible is not None:
        visible = visible[None, None]
    if key_mask is not None:
        padding = key_mask[:, None, None, :]
        visible = padding.expand(-1, 1, len(queries), -1) if visible is None else visible & padding
    return visible
