"""Scores on one axis as bars, with the interval of each where there are several examples."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastlens.errors import ShapeError
from fastlens.figures import (
    COLOR_MAP,
    MAX_INCHES,
    TICK_SIZE,
    drawable,
    label_side,
    named_together,
    new_figure,
    number_text,
    reach,
    shortened,
)
from fastlens.scores import Scores
from fastlens.scores_text import visible

# Entries of these follow one another, so they keep their order and are read from left to right.
ORDERED = ("layer", "pos", "query_pos", "key_pos")
MAX_BARS = 40
MAX_ORDERED = 1000
MAX_NAME = 44
# Of the intervals drawn.
LEVEL = 0.95
BAR_INCHES = 0.24


@dataclass(frozen=True)
class Bars:
    """One panel: a bar per entry, from the reference to its value.

    Attributes:
        numbers: Values, in the order drawn.
        ends: Lower and upper ends of their intervals, or None.
        left_out: Weaker entries that are not shown.
        examples: What the intervals are over.
    """

    scores: Scores
    numbers: np.ndarray
    ends: tuple[np.ndarray, np.ndarray] | None
    labels: list[str]
    is_ordered: bool
    left_out: int
    examples: int

    @classmethod
    def of(cls, scores: Scores) -> "Bars":
        """The bars of scores with one axis: those of a run, head or the like strongest first.

        Raises: ShapeError for positions or layers too many to draw.
        """
        axis = scores.axes[0]
        n = scores.values.shape[0]
        is_ordered = axis in ORDERED
        if is_ordered and n > MAX_ORDERED:
            raise ShapeError(
                f"{n} bars, one for each {axis}, are too many to draw (at most {MAX_ORDERED}). "
                f"Select some, e.g. scores.select({axis}=slice(0, {MAX_ORDERED})).plot()."
            )
        order = list(range(n)) if is_ordered else [c.index[0] for c in scores.top(MAX_BARS)]
        examples = 0 if scores.per_example is None else scores.per_example.shape[0]
        ends = None
        if scores.per_example is not None and examples > 1:
            shown = replace(
                scores,
                values=scores.values[order],
                labels={axis: [scores.labels[axis][i] for i in order]},
                per_example=scores.per_example[:, order],
            )
            low, high = shown.interval(LEVEL)
            ends = low.double().cpu().numpy(), high.double().cpu().numpy()
        names = [drawable(visible(scores.labels[axis][i], axis)) for i in order]
        return cls(
            scores=scores,
            numbers=scores.values.detach().double().cpu().numpy()[order],
            ends=ends,
            labels=[shortened(name) if is_ordered else shortened(name, MAX_NAME) for name in names],
            is_ordered=is_ordered,
            left_out=n - len(order),
            examples=examples,
        )

    @property
    def size(self) -> tuple[float, float]:
        """Inches of the panel with its labels."""
        n = len(self.numbers)
        text = 0.075 * max(len(label) for label in self.labels)
        if self.is_ordered:
            return min(max(0.3 * n, 3.2), MAX_INCHES) + 1.2, 3.0 + text
        return 4.6 + text, BAR_INCHES * n + 1.0

    @property
    def bar(self) -> float:
        """Inches from one bar to the next."""
        n = len(self.numbers)
        return min(max(0.3 * n, 3.2), MAX_INCHES) / n if self.is_ordered else BAR_INCHES


def bar_figure(panels: list[Bars]) -> tuple[Any, list[Any]]:
    """A figure with room for these panels, and its axes."""
    across = 1 if panels[0].is_ordered else min(2, len(panels))
    down = math.ceil(len(panels) / across)
    width = max(panel.size[0] for panel in panels)
    height = max(panel.size[1] for panel in panels)
    figure = new_figure(across * width, down * height + 0.3)
    axes = list(figure.subplots(down, across, squeeze=False).reshape(-1))
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    return figure, axes[: len(panels)]


def draw_bars(ax: Any, bars: Bars, values: bool | None) -> None:
    """Draw one panel into ``ax``.

    Args:
        values: Write the numbers; by default where the bars are named one by one.
    """
    from matplotlib import colormaps

    scores = bars.scores
    middle = scores.reference if math.isfinite(scores.reference) else 0.0
    away = np.where(np.isfinite(bars.numbers), bars.numbers - middle, np.nan)
    below, above = (colormaps[COLOR_MAP](shade) for shade in (0.15, 0.85))
    colors = [above if number >= 0 else below for number in np.nan_to_num(away)]
    places = np.arange(len(away))
    ends = _lengths(bars, middle + away)
    style: dict[str, Any] = {"color": colors, "ecolor": "0.3", "capsize": 2, "error_kw": {"lw": 1}}
    unit = _unit(bars)
    if bars.is_ordered:
        ax.bar(places, away, 0.8, bottom=middle, yerr=ends, **style)
        label_side(ax.xaxis, scores.axes[0], bars.labels, bars.bar)
        ax.set_xlim(-0.7, len(away) - 0.3)
        ax.set_ylabel(unit, fontsize=9, parse_math=False)
    else:
        ax.barh(places, away, 0.8, left=middle, xerr=ends, **style)
        label_side(ax.yaxis, "", bars.labels, bars.bar, upright=True)
        ax.set_ylim(len(away) - 0.4, -0.6)
        ax.set_xlabel(unit, fontsize=9, parse_math=False)
    _frame(ax, bars, middle, ends)
    if (not bars.is_ordered) if values is None else values:
        _write_numbers(ax, bars)


def _lengths(bars: Bars, numbers: np.ndarray) -> np.ndarray | None:
    """How far the interval goes below and above each bar's end."""
    if bars.ends is None:
        return None
    low, high = bars.ends
    return np.nan_to_num(np.stack([numbers - low, high - numbers])).clip(0)


def _unit(bars: Bars) -> str:
    lines = [bars.scores.unit] if bars.scores.unit else []
    if bars.ends is not None:
        lines.append(f"mean of {bars.examples} examples, {LEVEL:.0%} interval")
    if bars.left_out:
        whole = len(bars.numbers) + bars.left_out
        lines.append(f"the {len(bars.numbers)} strongest of {whole}")
    return "\n".join(drawable(line) for line in lines)


def _frame(ax: Any, bars: Bars, middle: float, ends: np.ndarray | None) -> None:
    """Limits, the line of the reference, and the baselines that lie near."""
    numbers = bars.numbers
    if ends is not None:
        numbers = np.concatenate([numbers, numbers - ends[0], numbers + ends[1]])
    _, low, high = reach(numbers, middle, bars.scores.baselines)
    margin = 0.05 * (high - low)
    limits = (low - margin, high + margin)
    line = ax.axhline if bars.is_ordered else ax.axvline
    (ax.set_ylim if bars.is_ordered else ax.set_xlim)(*limits)
    line(middle, color="0.2", linewidth=0.8)
    ax.tick_params(labelsize=TICK_SIZE, length=2)
    (ax.xaxis if bars.is_ordered else ax.yaxis).set_tick_params(length=0)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(axis="y" if bars.is_ordered else "x", color="0.9", linewidth=0.6)
    baselines = bars.scores.baselines
    for number in baselines.values():
        if low <= number <= high:
            line(number, color="0.45", linewidth=0.8, linestyle=(0, (4, 3)))
    # A name needs its height beside upright bars, its width above the others.
    longest = max((len(name) for name in baselines), default=0)
    share = 0.06 if bars.is_ordered else 0.018 * longest
    for name, number in named_together(baselines, low, high, share * (high - low)):
        ax.annotate(
            name,
            (1, number) if bars.is_ordered else (number, 1),
            xycoords=("axes fraction", "data") if bars.is_ordered else ("data", "axes fraction"),
            xytext=(3, 0) if bars.is_ordered else (0, 2),
            textcoords="offset points",
            ha="left" if bars.is_ordered else "center",
            va="center" if bars.is_ordered else "bottom",
            fontsize=7,
            color="0.3",
            parse_math=False,
        )


def _write_numbers(ax: Any, bars: Bars) -> None:
    """The numbers in a column beside the bars, or above them."""
    span = float(np.abs(bars.numbers[np.isfinite(bars.numbers)]).max(initial=0.0)) or 1.0
    for place, number in enumerate(bars.numbers):
        ax.annotate(
            number_text(float(number), span),
            (place, 1) if bars.is_ordered else (1, place),
            xycoords=("data", "axes fraction") if bars.is_ordered else ("axes fraction", "data"),
            xytext=(0, 2) if bars.is_ordered else (4, 0),
            textcoords="offset points",
            ha="center" if bars.is_ordered else "left",
            va="bottom" if bars.is_ordered else "center",
            fontsize=7,
            color="0.25",
        )
