"""``transformer_lens.tools.analysis.direct_logit_attribution``: shares of a logit from a cache.

`fastlens.analysis.direct_logit_attribution` also takes unfolded norms, norms behind sublayers and
neurons, and its shares sum to the logit.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from fastlens.cache.activations import AnySlice
from fastlens.errors import did_you_mean

TokenInput = str | int | Int[Tensor, "..."]
Unit = str
UNITS = ("component", "layer", "head")


@dataclass
class DirectLogitAttribution:
    """What `direct_logit_attribution` found.

    Attributes:
        attribution: Shares in logits, one row for each of ``labels``; without the position's axis
            where one position was chosen.
        labels: ``embed``, ``0_attn_out``, ``L3H7``, ...
        unit: How the stream was split up.
    """

    attribution: Float[Tensor, "component ..."]
    labels: list[str]
    unit: Unit

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` highest shares with their labels, the mean over prompts and positions."""
        means = self.attribution.flatten(1).mean(1) if self.attribution.ndim > 1 else None
        values, order = (self.attribution if means is None else means).topk(
            min(k, len(self.labels))
        )
        return [(self.labels[i], value) for i, value in zip(order, values.tolist(), strict=True)]


def direct_logit_attribution(
    model: Any,
    input: str | list[str] | Int[Tensor, "*batch pos"] | None = None,
    answer_tokens: TokenInput | None = None,
    incorrect_tokens: TokenInput | None = None,
    *,
    unit: Unit = "component",
    pos: AnySlice = -1,
    cache: Any = None,
) -> DirectLogitAttribution:
    """How much of the answer's logit (less the incorrect answer's) each part of the model wrote.

    For models whose norms are folded (the default of ``from_pretrained``); ``b_U`` is no one's.

    Args:
        input: Text or tokens; not needed with a ``cache``.
        answer_tokens, incorrect_tokens: As in ``ActivationCache.logit_attrs``.
        unit: ``"component"`` (embeddings, attention, MLPs), ``"layer"`` (the whole stream after
            each sublayer) or ``"head"`` (heads, and a remainder).
        pos: Positions to keep; None is all.
        cache: Of a run that was made already.

    Raises: ValueError for an unknown unit, no answer, or neither input nor cache.
    """
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} must be one of {UNITS}.{did_you_mean(str(unit), UNITS)}")
    if answer_tokens is None:
        raise ValueError("answer_tokens is required: whose logit is taken apart?")
    if cache is None and input is None:
        raise ValueError("give input= to run the model on, or the cache= of a run.")
    if cache is None:
        _, cache = model.run_with_cache(input)
    options = {"apply_ln": False, "pos_slice": pos, "return_labels": True}
    if unit == "component":
        stack, labels = cache.decompose_resid(**options)
    elif unit == "layer":
        stack, labels = cache.accumulated_resid(incl_mid=_has_middle(model), **options)
    else:
        stack, labels = cache.stack_head_results(incl_remainder=True, **options)
    attribution = cache.logit_attrs(
        stack,
        tokens=answer_tokens,
        incorrect_tokens=incorrect_tokens,
        pos_slice=pos,
        has_batch_dim=cache.has_batch_dim,
    )
    return DirectLogitAttribution(attribution, labels, unit)


def _has_middle(model: Any) -> bool:
    """Whether there is a stream between attention and MLP."""
    return not (model.cfg.attn_only or model.cfg.parallel_attn_mlp)
