"""`Scores` as pictures: heatmaps here, bars for one axis in `fastlens.bars`."""

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlens.bars import Bars, bar_figure, draw_bars
from fastlens.errors import ShapeError
from fastlens.figures import (
    COLOR_MAP,
    MAX_INCHES,
    TICK_SIZE,
    drawable,
    label_side,
    named_together,
    need_matplotlib,
    new_figure,
    number_text,
    reach,
    shortened,
    write_figure,
)
from fastlens.scores import Scores
from fastlens.scores_text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 16
# Of rows or columns; beyond, a cell has less than two dots.
MAX_ENTRIES = 1000
# Inches.
CELL_WIDTH = (0.15, 0.62)
CELL_HEIGHT = (0.17, 0.42)
# Longest side of a panel before cells shrink to their least size: one panel, a few, many.
MAX_SIDE = {1: 7.0, 3: 4.5, MAX_PANELS: 3.0}
MAX_BAR = 6.0
VALUES_FIT = 0.4

# The axis that goes up the page, first match; and the one that becomes panels.
VERTICAL = ("layer", "query_pos")
PANELS = ("metric", "kind", "site", "head", "neuron")


def plot(
    scores: Scores,
    path: str | Path | None = None,
    *,
    panel: str | None = None,
    title: str | None = None,
    values: bool | None = None,
    ax: "Axes | None" = None,
    dpi: int = 160,
) -> "Figure":
    """The picture that suits the scores; ``scores.plot()`` comes here.

    Two and three axes make a `heatmap`. One axis makes bars from the reference to each value:
    layers and positions from left to right; heads, sites, explicit runs and the like one below
    the other, strongest first, at most 40. Where there are values of several examples, a line shows
    the 95 % bootstrap interval of their mean (`Scores.interval`). Several metrics get a panel each,
    with a scale of their own.

    Args:
        path: Write the picture there; the suffix picks the format (png, pdf, svg). In a notebook
            the returned figure shows itself.
        panel: For three axes, the one that becomes panels.
        title: Instead of ``scores.title``.
        values: Write the numbers; by default where they fit.
        ax: Draw into these axes of your own figure (one panel only).
        dpi: Dots per inch of a written picture.

    Raises: ShapeError for scores of no or more than three axes, or too much to look at: it says
        what to select. MissingDependencyError without matplotlib. SourceError if ``path`` cannot
        be written.
    """
    several = "metric" in scores.axes
    if len(scores.axes) - several != 1 or scores.values.numel() == 0 or panel is not None:
        return heatmap(scores, path, panel=panel, title=title, values=values, ax=ax, dpi=dpi)
    parts, labels = _panels(scores, "metric" if several else None)
    _one_panel(ax, parts)
    need_matplotlib()
    panels = [Bars.of(part) for part in parts]
    figure: Any
    figure, axes = bar_figure(panels) if ax is None else (ax.figure, [ax])
    for drawn, bars, label in zip(axes, panels, labels, strict=True):
        draw_bars(drawn, bars, values)
        # The names of baselines stand above horizontal bars, the numbers above upright ones.
        named = values if bars.is_ordered else bars.scores.baselines
        _set_heading(drawn, label, pad=12.0 if named else 6.0)
    _finish(figure, axes, scores if ax is None else parts[0], title, own_figure=ax is None)
    if path is not None:
        write_figure(figure, Path(path), dpi)
    return figure


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
    one of them, on one scale; metrics always become panels, each on its own.

    Arguments and errors are those of `plot`.
    """
    parts, labels = _panels(scores, panel)
    _one_panel(ax, parts)
    need_matplotlib()
    layouts = [_Layout.of(part, len(parts)) for part in parts]
    first = layouts[0]
    own_scales = "metric" in scores.axes
    scales = [_Scale.of(part if own_scales else scores) for part in parts]
    figure: Any
    if ax is None:
        figure, axes = _figure(first, own_scales)
    else:
        figure, axes = ax.figure, [ax]
    image = None
    for drawn, part, layout, scale, label in zip(axes, parts, layouts, scales, labels, strict=True):
        image = _draw(drawn, layout, scale, values)
        _set_heading(drawn, label)
        if own_scales:
            _add_color_bar(figure, [drawn], image, part, scale)
    if ax is None:
        _label_outside(axes, _across(first, own_scales))
    if not own_scales:
        _add_color_bar(figure, axes, image, scores, scales[0])
    _finish(figure, axes, scores if ax is None else parts[0], title, own_figure=ax is None)
    if path is not None:
        write_figure(figure, Path(path), dpi)
    return figure


def _one_panel(ax: Any, parts: list[Scores]) -> None:
    if ax is not None and len(parts) > 1:
        raise ShapeError(f"ax= takes one panel, and these scores make {len(parts)}. Select one.")


# -- what goes where -----------------------------------------------------------------------------


def _panels(scores: Scores, panel: str | None) -> tuple[list[Scores], list[str]]:
    """The scores of each panel, and its heading."""
    n_axes = len(scores.axes)
    sizes = dict(zip(scores.axes, scores.values.shape, strict=True))
    if scores.values.numel() == 0 or not 1 <= n_axes <= 3 or scores.axes == ("metric",):
        raise ShapeError(
            f"a picture takes one to three axes, of which metric is not the only one; these "
            f"scores have {sizes or 'none'}. Fix some of them, e.g. "
            f"scores.select({(scores.axes or ('layer',))[0]}=0), or print scores.table()."
        )
    if panel is not None and panel not in scores.axes:
        raise ShapeError(f"panel={panel!r} is none of the axes {list(scores.axes)}.")
    if "metric" in sizes and panel not in (None, "metric"):
        raise ShapeError(
            f"panel={panel!r} would put metrics of different scales side by side in one panel. "
            f"Select one first: scores.select(metric={scores.labels['metric'][0]!r})."
        )
    if "metric" not in sizes:
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
    n_panels: int

    @classmethod
    def of(cls, scores: Scores, n_panels: int) -> "_Layout":
        matrix = scores.values.detach().double().cpu().numpy()
        axes = list(scores.axes)
        for axis, size in zip(axes, matrix.shape, strict=True):
            if size > MAX_ENTRIES:
                raise ShapeError(
                    f"{size} entries of {axis} are too many for a heatmap (at most "
                    f"{MAX_ENTRIES}). Select some, e.g. scores.select({axis}=slice(0, "
                    f"{MAX_ENTRIES})).plot(); scores.top(10) finds the strongest."
                )
        labels = {
            axis: [shortened(drawable(visible(label, axis))) for label in scores.labels[axis]]
            for axis in axes
        }
        if len(axes) == 1:
            column = axes[0]
            return cls(matrix[None], "", [""], column, labels[column], n_panels)
        row = next((axis for axis in VERTICAL if axis in axes), axes[0])
        column = axes[1 - axes.index(row)]
        matrix = matrix if axes[0] == row else matrix.T
        return cls(matrix, row, labels[row], column, labels[column], n_panels)

    @property
    def is_one_of_several(self) -> bool:
        """Whether there are other panels."""
        return self.n_panels > 1

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell, in inches."""
        rows, columns = self.matrix.shape
        side = next(inches for n, inches in MAX_SIDE.items() if self.n_panels <= n)
        longest = MAX_INCHES / 2 if self.is_one_of_several else MAX_INCHES
        width = min(max(side / columns, CELL_WIDTH[0]), CELL_WIDTH[1])
        height = min(max(side / rows, CELL_HEIGHT[0]), CELL_HEIGHT[1])
        return min(width, longest / columns), min(height, longest / rows)


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
        middle = scores.reference if math.isfinite(scores.reference) else 0.0
        return cls(middle, *reach(numbers, middle, scores.baselines))


# -- drawing -------------------------------------------------------------------------------------


def _across(layout: _Layout, own_scales: bool) -> int:
    """Panels in a row."""
    n_panels = layout.n_panels
    width = layout.matrix.shape[1] * layout.cell[0]
    most = 4 if width < 3.5 else 3 if n_panels == 3 and width < 5 else 2
    return min(n_panels, 2 if own_scales else most)


def _figure(layout: _Layout, own_scales: bool) -> tuple[Any, list[Any]]:
    """A figure of the right size with the axes of all panels in it."""
    n_panels = layout.n_panels
    rows, columns = layout.matrix.shape
    width, height = layout.cell
    across = _across(layout, own_scales)
    down = math.ceil(n_panels / across)
    longest = max(len(label) for label in layout.column_labels)
    margins = 1.9, 0.8 + 0.06 * longest
    size = (
        max(across * (columns * width + (1.0 if own_scales else 0.2)) + margins[0], 4.2),
        max(down * (rows * height + 0.25) + margins[1], 1.6),
    )
    figure = new_figure(*size)
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
    # Thinner between small cells, whose colours they would wash out.
    lines = {"color": "white", "linewidth": min(0.8, 4 * min(width, height))}
    ax.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, **lines)
    ax.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, **lines)
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim((-0.5, rows - 0.5) if origin == "lower" else (rows - 0.5, -0.5))
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    # Beside another panel, slanted labels would push the panels apart.
    steep = layout.is_one_of_several
    label_side(ax.xaxis, layout.column_axis, layout.column_labels, width, steep=steep)
    label_side(ax.yaxis, layout.row_axis, layout.row_labels, height, upright=True)
    fits = width >= VALUES_FIT and rows * columns <= 150
    if fits if values is None else values:
        _write_values(ax, layout.matrix, scale)
    return image


def _write_values(ax: Any, matrix: np.ndarray, scale: _Scale) -> None:
    for (row, column), number in np.ndenumerate(matrix):
        if not math.isfinite(number):
            continue
        dark = abs(number - scale.middle) > 0.6 * scale.span
        ax.text(
            column,
            row,
            number_text(float(number), scale.span),
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
    bar.set_label(drawable(scores.unit), fontsize=9, parse_math=False)
    span = scale.high - scale.low
    room = 0.13 / (shrink * figure.get_figheight()) * span
    for name, number in named_together(scores.baselines, scale.low, scale.high, room):
        bar.ax.annotate(
            name,
            (0, number),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=7,
            parse_math=False,
        )
    for number in scores.baselines.values():
        if scale.low <= number <= scale.high:
            bar.ax.axhline(number, color="black", linewidth=1)


def _set_heading(ax: Any, label: str, pad: float = 6.0) -> None:
    if label:
        ax.set_title(drawable(label), fontsize=9, pad=pad, parse_math=False)


def _finish(
    figure: Any, axes: list[Any], scores: Scores, title: str | None, *, own_figure: bool
) -> None:
    """The title of the whole: above our figure, or above the axes of the user's."""
    heading = drawable(visible(scores.title if title is None else title, ""))
    if heading and own_figure:
        # Letters are about 0.08 inches wide.
        lines = textwrap.wrap(heading, max(30, int(figure.get_figwidth() / 0.08)))
        figure.suptitle("\n".join(lines), fontsize=10, parse_math=False)
    elif heading:
        axes[0].set_title(heading, fontsize=10, parse_math=False)
