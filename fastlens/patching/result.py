"""From the values of runs to `Scores`."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlens.errors import MetricError, SweepError
from fastlens.patching.metrics import NORMALIZED_UNIT, Reading
from fastlens.patching.query import SweepPlan
from fastlens.patching.routing import RouterGap
from fastlens.scores import Scores

# Largest |difference in the metric| between two ways to make a run, per unit of max(1, |gap|).
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 2.5e-1,
}


@dataclass
class Outcome:
    """Plain (not normalised) values, and how they were come by.

    Attributes:
        values: Metric -> values ``[run]`` or ``[run, batch]``.
        base, other: Metric -> value of the base run and of the other prompt's.
        certificate: How runs were checked.
    """

    values: list[Tensor]
    base: list[Tensor]
    other: list[Tensor]
    certificate: dict[str, Any]

    def clean_and_corrupted(self, query: SweepPlan, metric: int) -> tuple[Tensor, Tensor]:
        """Values of the two runs that were not patched."""
        base, other = self.base[metric], self.other[metric]
        return (other, base) if query.direction == "denoising" else (base, other)

    def gap(self, query: SweepPlan, metric: int) -> float:
        """Clean minus corrupted, of the mean over examples."""
        clean, corrupted = self.clean_and_corrupted(query, metric)
        return float(clean.detach().double().mean() - corrupted.detach().double().mean())


def tolerance_of(query: SweepPlan, outcome: Outcome, metric: int) -> float:
    """Largest difference between two ways to make a run that rounding may cause."""
    dtypes = [query.model.cfg.dtype, *(codes.like.dtype for codes in query.codes)]
    tolerance = max(TOLERANCE.get(dtype, TOLERANCE[torch.float32]) for dtype in dtypes)
    gap = abs(outcome.gap(query, metric))
    largest = float(outcome.base[metric].detach().double().abs().max())
    # A metric of large numbers, such as a sum of logits, has a small gap and large rounding.
    return tolerance * max(1.0, gap, 1e-2 * largest if math.isfinite(largest) else 0.0)


def scores_of(query: SweepPlan, outcome: Outcome) -> Scores:
    """The scores of all metrics; of several, with an axis ``metric`` in front."""
    parts = [_one_metric(query, outcome, m) for m in range(len(query.readings))]
    if not query.is_several:
        return parts[0]
    first = parts[0]
    names = _distinct([reading.name for reading in query.readings])
    per_example = None
    if all(part.per_example is not None for part in parts):
        per_example = torch.stack([part.per_example for part in parts], 1)  # type: ignore[misc]
    whose = _whose(query)
    return Scores(
        values=torch.stack([part.values for part in parts]),
        axes=("metric", *first.axes),
        labels={"metric": names, **first.labels},
        title=f"{whose}{query.direction} {', '.join(query.grid.named)}",
        per_example=per_example,
        plan=first.plan,
        certificate=outcome.certificate,
        meta=first.meta,
        by_metric={
            name: {
                "unit": part.unit,
                "title": part.title,
                "reference": part.reference,
                "baselines": part.baselines,
            }
            for name, part in zip(names, parts, strict=True)
        },
    )


def _one_metric(query: SweepPlan, outcome: Outcome, metric: int) -> Scores:
    reading, grid = query.readings[metric], query.grid
    clean_values, corrupted_values = outcome.clean_and_corrupted(query, metric)
    values = outcome.values[metric].double()
    clean, corrupted = (float(x.detach().double().mean()) for x in (clean_values, corrupted_values))
    reference = corrupted if query.direction == "denoising" else clean
    baselines = {"clean": clean, "corrupted": corrupted}
    unit = reading.unit
    if reading.normalize:
        check_gap(clean_values, corrupted_values, reading)
        # Each example against its own corrupted run, over the mean gap, so that the mean over
        # examples is the ratio of means.
        values = (values - corrupted_values.double()) / outcome.gap(query, metric)
        reference = 0.0 if query.direction == "denoising" else 1.0
        baselines = {"clean": 1.0, "corrupted": 0.0}
        unit = NORMALIZED_UNIT
    is_per_example = outcome.base[metric].ndim == 1
    rows = values.reshape(len(values), -1).T.reshape(-1, *grid.shape)
    keep = outcome.base[metric].dtype
    return Scores(
        values=rows.mean(0).to(keep),
        axes=grid.axes,
        labels=dict(grid.labels),
        unit=unit,
        title=f"{_whose(query)}{query.direction} {', '.join(grid.named)}, {reading.name}",
        per_example=rows.to(keep) if is_per_example else None,
        reference=reference,
        baselines=baselines,
        plan=query.summary(),
        certificate=outcome.certificate,
        meta={
            "model": query.model.cfg.model_name,
            "sites": list(grid.named),
            "direction": query.direction,
            "metric": reading.name,
            "clean_metric": clean,
            "corrupted_metric": corrupted,
            "clean_tokens": query.prompts.clean.tolist(),
            "corrupted_tokens": query.prompts.corrupted.tolist(),
            **query.record,
        },
    )


def _whose(query: SweepPlan) -> str:
    name = query.model.cfg.model_name
    return "" if name == "custom" else f"{name}: "


def _distinct(names: list[str]) -> list[str]:
    """Names with a number behind those that come twice."""
    return [
        name if names.count(name) == 1 else f"{name} #{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def check_gap(clean: Tensor, corrupted: Tensor, reading: Reading) -> None:
    """Raises: MetricError if the two runs give the same, so that fractions mean nothing."""
    a, b = (float(x.detach().double().mean()) for x in (clean, corrupted))
    rounding = 16 * torch.finfo(clean.dtype).eps * max(abs(a), abs(b))
    if not math.isfinite(a - b) or abs(a - b) <= rounding:
        raise MetricError(
            f"{reading.name} is {a:.6g} on the clean run and {b:.6g} on the corrupted one, so "
            f"fractions of their gap mean nothing. Use normalize=False or other prompts."
        )


def _near_tie(router_gap: dict[str, Any]) -> str:
    """How near the routers of the run came to another choice of experts."""
    nearest = RouterGap(**router_gap)
    text = (
        f"The nearest call of a router was in layer {nearest.layer}, where the last expert that "
        f"was chosen and the first that was not are {nearest.gap:.3g} apart in logits. "
    )
    if nearest.gap > nearest.rounding:
        return text
    return text + (
        "Rounding can turn such a choice over, and then neither run is wrong: float64 weights "
        "tell. If it is not that: "
    )


def refuse_if_wrong(scores: Scores) -> None:
    """Raises: SweepError with the scores in it if a run made again differs too much."""
    certificate = scores.certificate or {}
    difference = certificate.get("max_difference", 0.0)
    # Written so that NaN is refused too.
    if not difference <= certificate["tolerance"]:
        reason = "Something in the model depends on what else is in the batch, or this is a fault"
        reason += " of fastlens."
        if "router_gap" in certificate:
            reason = _near_tie(certificate["router_gap"]) + reason
        error = SweepError(
            f"a run made again by run_with_hooks differs by {difference:.3g} from the sweep's "
            f"(tolerance {certificate['tolerance']:.3g}). {reason} The scores are in this error's "
            f".scores; strategy: {(scores.plan or {}).get('strategy')}."
        )
        error.scores = scores  # type: ignore[attr-defined]
        raise error
