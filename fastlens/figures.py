"""What all pictures of `Scores` share: figures, text that can be drawn, colours, files.

matplotlib is imported when something is drawn, and its global state is left alone: no pyplot, no
backend, no rcParams.
"""

import contextlib
import io
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fastlens.errors import MissingDependencyError, SourceError
from fastlens.scores_text import code_point

# Red below the reference, white at it, blue above: TransformerLens' and plotly's "RdBu".
COLOR_MAP = "RdBu"
MAX_LABEL = 22
TICK_SIZE = 8
# Inches: what a label along a side needs, and the longest side of a picture's panels.
LABEL_SPACE = 0.14
MAX_INCHES = 13.0

AXIS_TITLES = {
    "pos": "position",
    "query_pos": "query position",
    "key_pos": "key position",
}


def axis_title(name: str) -> str:
    """What is written beside an axis of scores."""
    return AXIS_TITLES.get(name, name.replace("_", " "))


def label_side(
    axis: Any,
    name: str,
    labels: list[str],
    cell: float,
    *,
    upright: bool = False,
    steep: bool = False,
) -> None:
    """Write labels along a side of a picture, as many as fit without overlapping.

    Args:
        axis: matplotlib's ``ax.xaxis`` or ``ax.yaxis``.
        cell: Inches from one label to the next.
        upright: The labels stand one above the other, so they need not be turned.
        steep: Labels that do not fit are turned by a right angle; otherwise slanted if they can be.
    """
    every = max(1, math.ceil(LABEL_SPACE / cell))
    shown = range(0, len(labels), every)
    longest = max(len(label) for label in labels)
    # Letters are about 0.08 inches wide.
    flat = upright or longest * 0.08 + 0.05 < cell * every
    rotation = 0 if flat else 90 if steep or cell * every < 0.3 else 50
    props: dict[str, Any] = {"fontsize": TICK_SIZE, "rotation": rotation, "parse_math": False}
    if rotation == 50:
        props |= {"ha": "right", "va": "top", "rotation_mode": "anchor"}
    axis.set_ticks(list(shown), [labels[i] for i in shown], **props)
    axis.set_label_text(axis_title(name), fontsize=9, parse_math=False)


def number_text(number: float, span: float) -> str:
    """A number in a picture, with as many decimals as a scale of ``span`` calls for: two or more.

    >>> number_text(0.01234, 0.05), number_text(1.2345, 3.0), number_text(123.4, 150.0)
    ('0.012', '1.23', '123')
    """
    if not math.isfinite(number):
        return str(number)
    if abs(number) >= 1e5 or span < 1e-3:
        text = f"{number:.1e}"
    elif abs(number) >= 100:
        text = f"{number:.0f}"
    else:
        text = f"{number:.{max(2, 1 - math.floor(math.log10(span)))}f}"
    # A number that rounds to zero has no sign.
    return text.removeprefix("-") if float(text) == 0 else text


def reach(numbers: np.ndarray, middle: float, baselines: dict[str, float]) -> tuple[float, ...]:
    """How far numbers go: the largest distance from ``middle``, the lowest and the highest.

    A baseline little beyond the strongest number counts, so that it is seen.
    """
    finite = numbers[np.isfinite(numbers)]
    span = float(np.abs(finite - middle).max()) if finite.size else 0.0
    # Differences of rounding alone should not light up a whole map.
    span = span if span > 1e-12 * max(1.0, abs(middle)) else 1.0
    near = [b for b in baselines.values() if abs(b - middle) <= 1.25 * span]
    span = max([span, *(abs(b - middle) for b in near)])
    shown = [middle, *near, *(float(f(finite)) for f in (np.min, np.max) if finite.size)]
    low, high = min(shown), max(shown)
    return span, low, high if high > low else middle + span


def named_together(
    baselines: dict[str, float], low: float, high: float, room: float
) -> list[tuple[str, float]]:
    """Names of the baselines between two ends and where to write them; near ones share a place.

    Args:
        room: What a name needs, in the unit of the baselines.
    """
    found = sorted((number, name) for name, number in baselines.items() if low <= number <= high)
    groups: list[list[tuple[float, str]]] = []
    for number, name in found:
        if groups and number - groups[-1][-1][0] < room:
            groups[-1].append((number, name))
        else:
            groups.append([(number, name)])
    return [
        (drawable(", ".join(name for _, name in group)), sum(n for n, _ in group) / len(group))
        for group in groups
    ]


def shortened(label: str, longest: int = MAX_LABEL) -> str:
    """The label, its middle cut out if it is long: the position at its end stays."""
    if len(label) <= longest:
        return label
    kept = (longest - 1) // 2
    return f"{label[:kept]}…{label[-kept:]}"


def drawable(text: str) -> str:
    """The text with characters that the font cannot draw written as their code points."""
    return "".join(char if _has_glyph(char) else code_point(char) for char in text)


@cache
def _has_glyph(char: str) -> bool:
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return char.isprintable() and font.get_char_index(ord(char)) != 0


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that many inches, which notebooks show by themselves."""
    return _figure_class()(figsize=(width, height), layout="constrained")


@cache
def _figure_class() -> type:
    """A Figure that notebooks show by itself; pyplot never hears of it."""
    from matplotlib.figure import Figure

    class ScoresFigure(Figure):
        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110)
            return buffer.getvalue()

    return ScoresFigure


def need_matplotlib() -> None:
    """Raises: MissingDependencyError, saying what to install, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "plotting needs matplotlib, which is not installed: "
            "pip install 'fastlens-interp[plot]'."
        ) from error


def write_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a picture; the file appears whole or not at all.

    Raises: SourceError if it cannot be written, or the suffix names no format.
    """
    path = path.expanduser()
    beside = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(beside, dpi=dpi, bbox_inches="tight", pad_inches=0.12)
        beside.replace(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot write the picture {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
