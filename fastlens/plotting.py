"""`Scores` as pictures.

matplotlib is imported when something is drawn, and its global state is left alone: no pyplot, no
backend, no rcParams.
"""

import contextlib
import io
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlens.errors import MissingDependencyError, ShapeError, SourceError
from fastlens.scores import Scores, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Red below the reference, white at it, blue above: TransformerLens' and plotly's "RdBu".
COLOR_MAP = "RdBu"
MAX_PANELS = 16
MAX_LABEL = 22
# Inches.
CELL_WIDTH = (0.24, 0.62)
CELL_HEIGHT = (0.17, 0.42)
# Longest side of a panel before cells shrink to their least size: one panel, a few, many.
MAX_SIDE = {1: 7.0, 3: 4.5, MAX_PANELS: 3.0}
MAX_BAR = 6.0
VALUES_FIT = 0.4
TICK_SIZE = 8

# The axis that goes up the page, first match; and the one that becomes panels.
VERTICAL = ("layer", "query_pos")
PANELS = ("kind", "site", "metric", "head", "neuron")


def heatmap(
    scores: Scores,
    path: str | Path | None = None,
    *,
    panel: str | None = None,
    title: str | None = None,
    values: bool | None = None,
    ax: "Axes | None" = None,
    dpi: int = 160,
) -> "Figure":
    """Scores of one to three axes as a heatmap.

    Layers go up the page, positions or heads to the right. White is ``scores.reference`` (the run
    that was not patched; zero where there is none), blue above it, red below; the scale is
    symmetric about it and marked with the baselines. Three axes become one panel for each entry of
    one of them, on one scale.

    Args:
        path: Write the picture there; the suffix picks the format (png, pdf, svg). In a notebook
            the returned figure shows itself.
        panel: For three axes, the one that becomes panels.
        title: Instead of ``scores.title``.
        values: Write the numbers into the cells; by default where they fit.
        ax: Draw into these axes of your own figure (one panel only).
        dpi: Dots per inch of a written picture.

    Raises: ShapeError for scores of no or more than three axes, or too many panels: it says what
        to select. MissingDependencyError without matplotlib. SourceError if ``path`` cannot be
        written.
    """
    parts, labels = _panels(scores, panel)
    if ax is not None and len(parts) > 1:
        raise ShapeError(f"ax= takes one panel, and these scores make {len(parts)}. Select one.")
    _need_matplotlib()
    layouts = [_Layout.of(part, len(parts)) for part in parts]
    scale = _Scale.of(scores)
    figure: Any
    if ax is None:
        figure, axes = _figure(layouts[0], len(parts))
    else:
        figure, axes = ax.figure, [ax]
    image = None
    for layout, drawn, label in zip(layouts, axes, labels, strict=True):
        image = _draw(drawn, layout, scale, values)
        if label:
            drawn.set_title(_drawable(label), fontsize=9, parse_math=False)
    if ax is None:
        _label_outside(axes, _across(layouts[0], len(parts)))
    heading = scores.title if title is None else title
    _add_color_bar(figure, axes, image, scores, scale)
    if heading and ax is None:
        figure.suptitle(_drawable(heading), fontsize=10, parse_math=False)
    elif heading:
        axes[0].set_title(_drawable(heading), fontsize=10, parse_math=False)
    if path is not None:
        _write(figure, Path(path), dpi)
    return figure


# -- what goes where -----------------------------------------------------------------------------


def _panels(scores: Scores, panel: str | None) -> tuple[list[Scores], list[str]]:
    """The scores of each panel, and its heading."""
    n_axes = len(scores.axes)
    sizes = dict(zip(scores.axes, scores.values.shape, strict=True))
    if scores.values.numel() == 0 or not 1 <= n_axes <= 3:
        raise ShapeError(
            f"a heatmap takes one to three axes; these scores have {sizes or 'none'}. "
            f"Fix some of them, e.g. scores.select({(scores.axes or ('layer',))[0]}=0)."
        )
    if panel is not None and panel not in scores.axes:
        raise ShapeError(f"panel={panel!r} is none of the axes {list(scores.axes)}.")
    if n_axes < 3 and panel is None:
        return [scores], [""]
    if n_axes == 1:
        raise ShapeError("panel= needs at least two axes.")
    chosen = panel or next((axis for axis in PANELS if axis in sizes), scores.axes[0])
    if sizes[chosen] > MAX_PANELS:
        raise ShapeError(
            f"{sizes[chosen]} panels, one for each {chosen}, are too many to look at (at most "
            f"{MAX_PANELS}). Select some, e.g. scores.select({chosen}=0).plot() or "
            f"scores.select({chosen}=slice(0, {MAX_PANELS})).plot(); scores.top(10) finds the "
            f"strongest."
        )
    parts = [scores.select(**{chosen: i}) for i in range(sizes[chosen])]
    return parts, [visible(label, chosen) for label in scores.labels[chosen]]


@dataclass(frozen=True)
class _Layout:
    """One panel: a matrix, and what to write on its sides."""

    matrix: np.ndarray
    row_axis: str
    row_labels: list[str]
    column_axis: str
    column_labels: list[str]
    max_side: float

    @classmethod
    def of(cls, scores: Scores, n_panels: int) -> "_Layout":
        side = next(inches for n, inches in MAX_SIDE.items() if n_panels <= n)
        matrix = scores.values.detach().double().cpu().numpy()
        axes = list(scores.axes)
        labels = {
            axis: [_shortened(_drawable(visible(label, axis))) for label in scores.labels[axis]]
            for axis in axes
        }
        if len(axes) == 1:
            return cls(matrix[None], "", [""], axes[0], labels[axes[0]], side)
        row = next((axis for axis in VERTICAL if axis in axes), axes[0])
        column = axes[1 - axes.index(row)]
        matrix = matrix if axes[0] == row else matrix.T
        return cls(matrix, row, labels[row], column, labels[column], side)

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell, in inches."""
        rows, columns = self.matrix.shape
        width = min(max(self.max_side / columns, CELL_WIDTH[0]), CELL_WIDTH[1])
        height = min(max(self.max_side / rows, CELL_HEIGHT[0]), CELL_HEIGHT[1])
        return width, height


@dataclass(frozen=True)
class _Scale:
    """The colour scale: as far below the reference as above it; low to high is what occurs."""

    middle: float
    span: float
    low: float
    high: float

    @classmethod
    def of(cls, scores: Scores) -> "_Scale":
        numbers = scores.values.detach().double().cpu().numpy()
        finite = numbers[np.isfinite(numbers)]
        middle = scores.reference if math.isfinite(scores.reference) else 0.0
        span = float(np.abs(finite - middle).max()) if finite.size else 0.0
        # Differences of rounding alone should not light up the whole map.
        span = span if span > 1e-12 * max(1.0, abs(middle)) else 1.0
        # A baseline little beyond the strongest cell is worth showing.
        near = [b for b in scores.baselines.values() if abs(b - middle) <= 1.25 * span]
        span = max([span, *(abs(b - middle) for b in near)])
        shown = [middle, *near, *(float(f(finite)) for f in (np.min, np.max) if finite.size)]
        low, high = min(shown), max(shown)
        return cls(middle, span, low, high if high > low else middle + span)


# -- drawing -------------------------------------------------------------------------------------


def _across(layout: _Layout, n_panels: int) -> int:
    """Panels in a row."""
    width = layout.matrix.shape[1] * layout.cell[0]
    return min(n_panels, 4 if width < 3.5 else 3 if n_panels == 3 else 2)


def _figure(layout: _Layout, n_panels: int) -> tuple[Any, list[Any]]:
    """A figure of the right size with ``n_panels`` axes in it."""
    rows, columns = layout.matrix.shape
    width, height = layout.cell
    across = _across(layout, n_panels)
    down = math.ceil(n_panels / across)
    longest = max(len(label) for label in layout.column_labels)
    margins = 1.9, 0.8 + 0.06 * longest
    size = (
        max(across * (columns * width + 0.2) + margins[0], 4.2),
        max(down * (rows * height + 0.25) + margins[1], 1.6),
    )
    figure = _figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).reshape(-1)
    for unused in axes[n_panels:]:
        unused.set_axis_off()
    return figure, list(axes[:n_panels])


def _label_outside(axes: list[Any], across: int) -> None:
    """Panels share their sides: only the lowest and leftmost ones are written on."""
    for i, ax in enumerate(axes):
        if i + across < len(axes):
            ax.set_xticks([])
            ax.set_xlabel("")
        if i % across:
            ax.set_yticks([])
            ax.set_ylabel("")


def _draw(ax: Any, layout: _Layout, scale: _Scale, values: bool | None) -> Any:
    from matplotlib import colormaps

    rows, columns = layout.matrix.shape
    width, height = layout.cell
    colors = colormaps[COLOR_MAP].with_extremes(bad="0.8")
    # Query positions read downwards, like text; layers upwards, like the residual stream.
    origin = "lower" if layout.row_axis == "layer" else "upper"
    image = ax.imshow(
        layout.matrix,
        cmap=colors,
        vmin=scale.middle - scale.span,
        vmax=scale.middle + scale.span,
        aspect="auto" if layout.row_axis else height / width,
        interpolation="nearest",
        origin=origin,
    )
    ax.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=0.8)
    ax.tick_params(which="both", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    _label_side(ax.xaxis, layout.column_axis, layout.column_labels, width, upright=False)
    _label_side(ax.yaxis, layout.row_axis, layout.row_labels, height, upright=True)
    fits = width >= VALUES_FIT and rows * columns <= 150
    if fits if values is None else values:
        _write_values(ax, layout.matrix, scale)
    return image


def _label_side(axis: Any, name: str, labels: list[str], cell: float, *, upright: bool) -> None:
    # One label needs about the height of its letters.
    every = max(1, math.ceil(0.14 / cell))
    shown = range(0, len(labels), every)
    short = max(len(label) for label in labels) <= 3
    rotation = 0 if upright or (short and cell > 0.3) else 90 if cell < 0.3 else 50
    props: dict[str, Any] = {"fontsize": TICK_SIZE, "rotation": rotation, "parse_math": False}
    if rotation == 50:
        props |= {"ha": "right", "va": "top", "rotation_mode": "anchor"}
    axis.set_ticks(list(shown), [labels[i] for i in shown], **props)
    axis.set_label_text(_AXIS_TITLES.get(name, name.replace("_", " ")), fontsize=9)


_AXIS_TITLES = {
    "pos": "position",
    "query_pos": "query position",
    "key_pos": "key position",
    "head": "head",
    "layer": "layer",
}


def _write_values(ax: Any, matrix: np.ndarray, scale: _Scale) -> None:
    for (row, column), number in np.ndenumerate(matrix):
        if not math.isfinite(number):
            continue
        dark = abs(number - scale.middle) > 0.6 * scale.span
        text = f"{number:.2f}" if abs(number) < 100 else f"{number:.0f}"
        # A number that rounds to zero has no sign.
        text = text.removeprefix("-") if float(text) == 0 else text
        ax.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if dark else "0.25",
        )


def _add_color_bar(figure: Any, axes: list[Any], image: Any, scores: Scores, scale: _Scale) -> None:
    shrink = min(0.9, MAX_BAR / figure.get_figheight())
    bar = figure.colorbar(image, ax=axes, shrink=shrink, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.set_ylim(scale.low, scale.high)
    bar.ax.tick_params(labelsize=TICK_SIZE, length=2)
    bar.set_label(_drawable(scores.unit), fontsize=9, parse_math=False)
    for name, number in scores.baselines.items():
        if scale.low <= number <= scale.high:
            bar.ax.axhline(number, color="black", linewidth=1)
            bar.ax.annotate(
                _drawable(name),
                (0, number),
                xycoords=("axes fraction", "data"),
                xytext=(-3, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=7,
                parse_math=False,
            )


# -- text and files ------------------------------------------------------------------------------


def _shortened(label: str) -> str:
    """The label, its middle cut out if it is long: the position at its end stays."""
    if len(label) <= MAX_LABEL:
        return label
    kept = (MAX_LABEL - 1) // 2
    return f"{label[:kept]}…{label[-kept:]}"


def _drawable(text: str) -> str:
    """The text with characters that the font cannot draw written as their code points."""
    return "".join(char if _has_glyph(char) else _code_point(char) for char in text)


def _code_point(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


@cache
def _has_glyph(char: str) -> bool:
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return char.isprintable() and font.get_char_index(ord(char)) != 0


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


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "plotting needs matplotlib, which is not installed: "
            "pip install 'fastlens-interp[plot]'."
        ) from error


def _write(figure: Any, path: Path, dpi: int) -> None:
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
