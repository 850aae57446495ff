"""`Scores`: numbers on named axes, with labels, a unit and where they came from.

What every sweep and analysis returns. Drawing lives in `fastlens.plotting`, reached by name when
`Scores.plot` is called, so that this module stays at the bottom.
"""

import base64
import html
import importlib
import importlib.metadata
import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.bootstrap import mean_interval
from fastlens.errors import MissingDependencyError, ShapeError, SourceError, did_you_mean
from fastlens.scores_files import JSON_NAME as JSON_NAME
from fastlens.scores_files import TENSORS_NAME as TENSORS_NAME
from fastlens.scores_files import read_record, write_record
from fastlens.scores_files import writable_folder as writable_folder
from fastlens.scores_files import write_whole as write_whole
from fastlens.scores_text import cell_name, html_table, short, text_table
from fastlens.scores_text import visible as visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Selector: TypeAlias = int | str | slice
# What each metric of several has of its own, in `Scores.by_metric`.
METRIC_FIELDS = ("unit", "title", "reference", "baselines", "certificate")
# Cells of scores that a notebook shows as a picture without being asked.
PICTURE_CELLS = 20_000
STRONGEST = 5


class Cell(NamedTuple):
    """One entry of a `Scores`."""

    index: tuple[int, ...]
    labels: tuple[str, ...]
    name: str
    value: float
    change: float
    standard_error: float | None


@dataclass(repr=False, eq=False)
class Scores:
    """Numbers on named axes.

    >>> scores = Scores(torch.tensor([[0.0, 0.9], [0.1, -0.2]]), ("layer", "head"),
    ...                 {"layer": ["L0", "L1"], "head": ["H0", "H1"]}, unit="logits")
    >>> scores.top(1)[0].name
    'L0H1'
    >>> scores.select(head="H1").values
    tensor([ 0.9000, -0.2000])

    Attributes:
        values: The scores, in ``unit``; the mean over examples where there are several.
        axes: One name per dimension of ``values``, such as ``("layer", "pos")``.
        labels: What stands at each index of an axis: ``labels["pos"][3] == " Tower:3"``. An axis
            left out gets its indices.
        unit: Unit of ``values``.
        title: One line for plots and tables.
        per_example: The scores of each example, where the metric gives them.
        reference: The value that means "no effect" (of the run that was not patched), in ``unit``.
        baselines: Named values to compare with (``clean``, ``corrupted``), in ``unit``.
        plan: What was run, if something was.
        certificate: How far some of the runs were from a plain re-run, and the tolerance.
        meta: Anything else worth keeping, as JSON can hold it.
        versions: Of fastlens, torch and python; filled in.
        by_metric: Where one axis is ``"metric"``: label -> what that metric has of its own, any of
            ``unit``, ``title``, ``reference``, ``baselines`` and ``certificate``; the fields above
            stand for what is left out. ``select(metric=...)`` gives scores with these, and nothing
            compares or draws two metrics on one scale.

    Raises: ShapeError if axes, labels, per_example or by_metric do not fit ``values``.
    """

    values: Float[Tensor, "..."]
    axes: tuple[str, ...]
    labels: dict[str, list[str]] = field(default_factory=dict)
    unit: str = ""
    title: str = ""
    per_example: Float[Tensor, "batch ..."] | None = None
    reference: float = 0.0
    baselines: dict[str, float] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    by_metric: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        if len(self.axes) != len(shape) or len(set(self.axes)) != len(self.axes):
            raise ShapeError(
                f"values of shape {list(shape)} need {len(shape)} different axis names; "
                f"got {list(self.axes)}."
            )
        for axis in self.labels:
            if axis not in self.axes:
                raise ShapeError(f"labels for {axis!r}, but the axes are {list(self.axes)}.")
        for axis, size in zip(self.axes, shape, strict=True):
            found = self.labels.setdefault(axis, [str(i) for i in range(size)])
            if len(found) != size:
                raise ShapeError(f"axis {axis!r} has length {size} and {len(found)} labels.")
        if self.per_example is not None and tuple(self.per_example.shape[1:]) != shape:
            raise ShapeError(
                f"per_example must be [batch, {', '.join(self.axes)}] = [batch, *{list(shape)}]; "
                f"got {list(self.per_example.shape)}."
            )
        for label, facts in self.by_metric.items():
            self._check_metric(label, facts)

    def _check_metric(self, label: str, facts: Any) -> None:
        labels = self.labels.get("metric", [])
        if labels.count(label) != 1:
            raise ShapeError(
                f"by_metric names {label!r}, and the axis 'metric' has {labels or 'no entries'}: "
                f"each name must stand there once.{did_you_mean(label, labels)}"
            )
        for name in facts if isinstance(facts, Mapping) else [facts]:
            if name not in METRIC_FIELDS:
                raise ShapeError(
                    f"by_metric[{label!r}] holds {name!r}; it may hold {', '.join(METRIC_FIELDS)}."
                    f"{did_you_mean(str(name), METRIC_FIELDS)}"
                )

    # -- reading -----------------------------------------------------------------------------

    @property
    def standard_error(self) -> Float[Tensor, "..."] | None:
        """Standard error of the mean over examples; None for fewer than two examples."""
        if self.per_example is None or self.per_example.shape[0] < 2:
            return None
        return self.per_example.std(0) / math.sqrt(self.per_example.shape[0])

    def interval(
        self, level: float = 0.95, resamples: int = 2000, seed: int = 0, method: str = "bca"
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Bootstrap confidence interval of each cell's mean over examples.

        Examples are drawn anew, with replacement, the same ones for all cells, so cells may be
        compared. What was computed from all examples together is not: scores that are a fraction of
        the clean-corrupted gap keep the mean gap that was measured, so the interval says nothing of
        that gap's own error. With few examples (fewer than about ten) every bootstrap interval is
        too narrow.

        Args:
            level: Of confidence; each cell's interval alone holds at this level, not all together.
            resamples: Means to draw; more give steadier ends.
            seed: The same seed gives the same numbers.
            method: ``"bca"`` (bias-corrected and accelerated) or ``"percentile"``; Efron &
                Tibshirani 1993, chapters 14 and 13.

        Returns: the lower and the upper ends, shaped and typed as ``values``.

        Raises: ShapeError where there are no values of at least two examples.
        """
        n = 0 if self.per_example is None else self.per_example.shape[0]
        if self.per_example is None or n < 2:
            found = f"{n} of them" if n else "none"
            raise ShapeError(
                f"an interval needs the values of at least two examples (per_example); these "
                f"scores have {found}. Use a metric that returns [batch], on several prompts."
            )
        ends = mean_interval(
            _array(self.per_example).reshape(n, -1), level, resamples, seed, method
        )
        low, high = (
            torch.from_numpy(end).reshape(self.values.shape).to(self.values) for end in ends
        )
        return low, high

    def select(self, **selectors: Selector) -> "Scores":
        """A part of the scores: ``scores.select(kind="induction", layer=slice(0, 4))``.

        One metric of several comes with its own unit, title, reference and baselines.

        Args:
            selectors: Axis name -> an index or a label, which drops the axis, or a slice, which
                keeps it.

        Raises: ShapeError for an axis, label or index that is not there.
        """
        index: list[Any] = [slice(None)] * len(self.axes)
        labels = dict(self.labels)
        own: dict[str, Any] = {}
        for axis, selector in selectors.items():
            if axis not in self.axes:
                near = did_you_mean(axis, self.axes)
                raise ShapeError(f"no axis {axis!r}; the axes are {list(self.axes)}.{near}")
            if isinstance(selector, slice):
                index[self.axes.index(axis)] = selector
                labels[axis] = labels[axis][selector]
                continue
            position = self._position(axis, selector)
            index[self.axes.index(axis)] = position
            if axis == "metric":
                own = self._of_metric(labels[axis][position])
            del labels[axis]
        part = tuple(index)
        kept = labels.get("metric", [])
        own["by_metric"] = {name: facts for name, facts in self.by_metric.items() if name in kept}
        return replace(
            self,
            values=self.values[part],
            axes=tuple(axis for axis in self.axes if axis in labels),
            labels=labels,
            per_example=None if self.per_example is None else self.per_example[(..., *part)],
            **own,
        )

    def _of_metric(self, label: str) -> dict[str, Any]:
        """What one metric of several has of its own; a title in any case."""
        title = f"{self.title}, {label}" if self.title else label
        return {"title": title, **self.by_metric.get(label, {})}

    def _parts(self) -> list[tuple[str, "Scores"]]:
        """The scores of each metric with its label; with no axis of metrics, these scores alone."""
        if "metric" not in self.axes:
            return [("", self)]
        labels = self.labels["metric"]
        return [(label, self.select(metric=i)) for i, label in enumerate(labels)]

    def _position(self, axis: str, selector: int | str) -> int:
        labels = self.labels[axis]
        if isinstance(selector, str):
            if labels.count(selector) != 1:
                found = "several entries" if selector in labels else "no entry"
                raise ShapeError(
                    f"axis {axis!r} has {found} labelled {selector!r}."
                    f"{did_you_mean(selector, labels)} An index works too."
                )
            return labels.index(selector)
        if not -len(labels) <= selector < len(labels):
            raise ShapeError(f"axis {axis!r} has length {len(labels)}; got index {selector}.")
        return selector % len(labels)

    def top(self, k: int = 10) -> list[Cell]:
        """The ``k`` cells furthest from ``reference``, strongest first; NaN last.

        Of several metrics, which cannot be compared, the ``k`` of each, metric by metric.
        """
        if "metric" in self.axes:
            parts = enumerate(self._parts())
            return [self._whole(cell, i) for i, (_, part) in parts for cell in part.top(k)]
        distance = (self.values.detach().double().cpu() - self.reference).abs().flatten()
        order = torch.argsort(distance.nan_to_num(nan=-1.0, posinf=math.inf), descending=True)
        error = self.standard_error
        shape = tuple(self.values.shape)
        places = [np.unravel_index(int(i), shape) for i in order[: max(k, 0)]]
        return [self._cell(tuple(int(i) for i in place), error) for place in places]

    def _cell(self, index: tuple[int, ...], error: Tensor | None) -> Cell:
        labels = tuple(self.labels[a][i] for a, i in zip(self.axes, index, strict=True))
        value = self.values[index].item()
        return Cell(
            index=index,
            labels=labels,
            name=cell_name(self.axes, labels),
            value=value,
            change=value - self.reference,
            standard_error=None if error is None else error[index].item(),
        )

    def _whole(self, cell: Cell, metric: int) -> Cell:
        """A cell of one metric's scores as a cell of these."""
        at = self.axes.index("metric")
        index = (*cell.index[:at], metric, *cell.index[at:])
        labels = (*cell.labels[:at], self.labels["metric"][metric], *cell.labels[at:])
        return cell._replace(index=index, labels=labels, name=cell_name(self.axes, labels))

    def to_dataframe(self, interval: float | None = None) -> "DataFrame":
        """One row per cell: each axis' label and index, ``value``, ``change`` from the reference,
        and ``standard_error`` where there is one; for several metrics also the ``unit``.

        Args:
            interval: Add ``low`` and ``high``, the ends of the bootstrap interval at this level,
                such as 0.95 (see `interval`).

        Raises: MissingDependencyError without pandas. ShapeError for an interval of scores without
            the values of at least two examples.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError(
                "to_dataframe needs pandas, which is not installed: pip install pandas."
            ) from error
        index = np.indices(tuple(self.values.shape)).reshape(len(self.axes), -1)
        columns: dict[str, Any] = {}
        for axis, positions in zip(self.axes, index, strict=True):
            columns[axis] = [self.labels[axis][i] for i in positions]
        for axis, positions in zip(self.axes, index, strict=True):
            columns[f"{axis}_index"] = positions
        reference: Any = self.reference
        if "metric" in self.axes:
            parts = [part for _, part in self._parts()]
            of_cell = index[self.axes.index("metric")]
            columns["unit"] = [parts[i].unit for i in of_cell]
            reference = np.array([part.reference for part in parts], np.float64)[of_cell]
        columns["value"] = _array(self.values).reshape(-1)
        columns["change"] = columns["value"] - reference
        if (error := self.standard_error) is not None:
            columns["standard_error"] = _array(error).reshape(-1)
        if interval is not None:
            low, high = self.interval(interval)
            columns |= {"low": _array(low).reshape(-1), "high": _array(high).reshape(-1)}
        return pandas.DataFrame(columns)

    # -- showing -----------------------------------------------------------------------------

    def table(self, k: int = 10) -> str:
        """The strongest ``k`` cells as plain text, one a line, under a heading.

        Several metrics get a table each, with their own unit, baselines and reference.
        """
        lines = [self._headline(), *self._facts()]
        for label, part in self._parts():
            if label:
                lines += ["", part._metric_headline(label), *self._own_facts(part)]
            lines += text_table(part._rows(k), len(part.axes))
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None, **options: Any) -> "Figure":
        """A picture, written to ``path`` if given; see `fastlens.plotting.plot` for options.

        Heatmaps for two and three axes, bars for one, and a panel with its own scale per metric.

        Raises: MissingDependencyError without matplotlib. ShapeError for more than can be looked
            at; it says what to select.
        """
        return importlib.import_module("fastlens.plotting").plot(self, path, **options)

    def __repr__(self) -> str:
        try:
            lines = [self._headline(), *self._facts()]
            for label, part in self._parts():
                if label:
                    lines += [part._metric_headline(label)]
                    lines += [f"  {fact}" for fact in self._own_facts(part)]
                lines.append(("  " if label else "") + part._strongest())
            return "\n".join(lines)
        # A repr that raises hides what a debugger or a failing test was about to show.
        except Exception as error:
            return f"<Scores that cannot be shown: {error!r}>"

    def _repr_html_(self) -> str:
        try:
            head = [f"<b>{html.escape(self._headline())}</b>", *map(html.escape, self._facts())]
            parts = [f"<p>{'<br>'.join(head)}</p>", self._picture()]
            for label, part in self._parts():
                facts = [part._metric_headline(label), *self._own_facts(part)] if label else []
                caption = ": ".join(["strongest cells", *("; ".join(facts).splitlines())])
                parts.append(html_table(part._rows(STRONGEST * 2), len(part.axes), caption))
            return f"<div>{''.join(parts)}</div>"
        except Exception:
            return f"<pre>{html.escape(repr(self))}</pre>"

    def _picture(self) -> str:
        """The plot as part of an HTML page, or nothing if there is none to be had at once."""
        if self.values.numel() > PICTURE_CELLS:
            return ""
        try:
            png = self.plot(title="")._repr_png_()  # type: ignore[attr-defined]
        # No matplotlib, too many axes, a font that cannot be read: the table stands alone.
        except Exception:
            return ""
        data = base64.b64encode(png).decode()
        alt = html.escape(self._headline())
        return f'<img style="max-width:100%" alt="{alt}" src="data:image/png;base64,{data}">'

    def _headline(self) -> str:
        sizes = " x ".join(
            f"{axis} {size}" for axis, size in zip(self.axes, self.values.shape, strict=True)
        )
        unit = f", {self.unit}" if self.unit and "metric" not in self.axes else ""
        return f"{visible(self.title, '') or 'Scores'} ({sizes or 'one number'}{unit})"

    def _metric_headline(self, label: str) -> str:
        return visible(label, "metric") + (f" ({self.unit})" if self.unit else "")

    def _facts(self) -> list[str]:
        facts = [] if "metric" in self.axes else self._baselines()
        if self.per_example is not None and self.per_example.shape[0] > 1:
            facts.append(f"mean of {self.per_example.shape[0]} examples")
        plan = self.plan or {}
        if plan.get("strategy"):
            runs = f"{plan['runs']} runs, " if plan.get("runs") else ""
            facts.append(f"{runs}strategy: {plan['strategy']}")
        return facts + self._checked()

    def _own_facts(self, part: "Scores") -> list[str]:
        """What is to be said of one metric beside what was said of all."""
        checked = part._checked() if part.certificate is not self.certificate else []
        return part._baselines() + checked

    def _baselines(self) -> list[str]:
        named = [f"{name} {short(value)}" for name, value in self.baselines.items()]
        return [", ".join(named)] if named else []

    def _checked(self) -> list[str]:
        certificate = self.certificate or {}
        if "max_difference" not in certificate:
            return []
        return [
            f"checked: {certificate.get('runs')} of its runs repeated one at a time, "
            f"max difference {short(certificate['max_difference'])}"
        ]

    def _strongest(self) -> str:
        cells = [f"{cell.name} {short(cell.value)}" for cell in self.top(STRONGEST)]
        return f"strongest: {', '.join(cells)}" if cells else "empty"

    def _rows(self, k: int) -> list[list[str]]:
        """A header row and one row per cell of ``top(k)``; the first columns are the axes."""
        cells = self.top(k)
        with_error = self.standard_error is not None
        header = [*self.axes, self.unit if len(self.unit) < 20 and self.unit else "value"]
        header += ["change"] if self.reference else []
        header += ["+-"] if with_error else []
        rows = [header]
        for cell in cells:
            names = [visible(label, a) for a, label in zip(self.axes, cell.labels, strict=True)]
            row = [*names, short(cell.value)]
            row += [f"{cell.change:+.4g}"] if self.reference else []
            row += [short(cell.standard_error)] if with_error else []
            rows.append(row)
        return rows

    # -- files -------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``scores.json`` and ``scores.safetensors`` into ``folder`` (made if needed).

        Each file appears whole or not at all, and the first names the second by its SHA-256, so a
        pair that does not belong together is found at load.

        Returns: the folder.
        Raises: SourceError if it cannot be written.
        """
        folder = writable_folder(folder)
        tensors = {"values": self.values}
        if self.per_example is not None:
            tensors["per_example"] = self.per_example
        record = {
            "title": self.title,
            "unit": self.unit,
            "axes": list(self.axes),
            "labels": self.labels,
            "reference": self.reference,
            "baselines": self.baselines,
            "by_metric": self.by_metric,
            "plan": self.plan,
            "certificate": self.certificate,
            "versions": self.versions,
            "meta": self.meta,
        }
        write_record(folder, record, tensors)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Scores":
        """What `save` wrote.

        Raises: SourceError naming the file that is missing, torn or not ours.
        """
        folder = Path(folder)
        folder = folder.parent if folder.name in (JSON_NAME, TENSORS_NAME) else folder
        record, tensors = read_record(folder)
        try:
            fields = {k: record[k] for k in ("title", "unit", "labels", "reference", "baselines")}
            return cls(
                values=tensors["values"],
                axes=tuple(record["axes"]),
                per_example=tensors.get("per_example"),
                plan=record["plan"],
                certificate=record["certificate"],
                meta=record["meta"],
                versions=record["versions"],
                # Files of before there were several metrics have none.
                by_metric=record.get("by_metric", {}),
                **fields,
            )
        except (AttributeError, KeyError, TypeError, ShapeError) as error:
            raise SourceError(
                f"{folder / JSON_NAME} does not fit {TENSORS_NAME}: {error}"
            ) from error


def _array(tensor: Tensor) -> np.ndarray:
    """The numbers for numpy, which has no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _versions() -> dict[str, str]:
    try:
        ours = importlib.metadata.version("fastlens-interp")
    except importlib.metadata.PackageNotFoundError:
        ours = str(getattr(sys.modules.get("fastlens"), "__version__", "source"))
    return {
        "fastlens": ours,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
