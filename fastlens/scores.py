"""`Scores`: numbers on named axes, with labels, a unit and where they came from.

What every sweep and analysis returns. Drawing lives in `fastlens.plotting`, reached by name when
`Scores.plot` is called, so that this module stays at the bottom.
"""

import contextlib
import hashlib
import html
import importlib
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from fastlens.errors import MissingDependencyError, ShapeError, SourceError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

FORMAT = "fastlens.scores"
FORMAT_VERSION = 1
JSON_NAME = "scores.json"
TENSORS_NAME = "scores.safetensors"
Selector: TypeAlias = int | str | slice


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

    Raises: ShapeError if axes, labels or per_example do not fit ``values``.
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

    # -- reading -----------------------------------------------------------------------------

    @property
    def standard_error(self) -> Float[Tensor, "..."] | None:
        """Standard error of the mean over examples; None for fewer than two examples."""
        if self.per_example is None or self.per_example.shape[0] < 2:
            return None
        return self.per_example.std(0) / math.sqrt(self.per_example.shape[0])

    def select(self, **selectors: Selector) -> "Scores":
        """A part of the scores: ``scores.select(kind="induction", layer=slice(0, 4))``.

        Args:
            selectors: Axis name -> an index or a label, which drops the axis, or a slice, which
                keeps it.

        Raises: ShapeError for an axis, label or index that is not there.
        """
        index: list[Any] = [slice(None)] * len(self.axes)
        labels = dict(self.labels)
        for axis, selector in selectors.items():
            if axis not in self.axes:
                near = did_you_mean(axis, self.axes)
                raise ShapeError(f"no axis {axis!r}; the axes are {list(self.axes)}.{near}")
            if isinstance(selector, slice):
                index[self.axes.index(axis)] = selector
                labels[axis] = labels[axis][selector]
            else:
                index[self.axes.index(axis)] = self._position(axis, selector)
                del labels[axis]
        part = tuple(index)
        return replace(
            self,
            values=self.values[part],
            axes=tuple(axis for axis in self.axes if axis in labels),
            labels=labels,
            per_example=None if self.per_example is None else self.per_example[(..., *part)],
        )

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
        """The ``k`` cells furthest from ``reference``, strongest first; NaN last."""
        distance = (self.values.double().cpu() - self.reference).abs().flatten()
        order = torch.argsort(distance.nan_to_num(nan=-1.0, posinf=math.inf), descending=True)
        flat = [int(i) for i in order[: max(k, 0)]]
        return [self._cell(np.unravel_index(i, tuple(self.values.shape))) for i in flat]

    def _cell(self, index: Any) -> Cell:
        index = tuple(int(i) for i in index)
        labels = tuple(self.labels[a][i] for a, i in zip(self.axes, index, strict=True))
        value = float(self.values[index])
        error = self.standard_error
        return Cell(
            index=index,
            labels=labels,
            name=_cell_name(self.axes, labels),
            value=value,
            change=value - self.reference,
            standard_error=None if error is None else float(error[index]),
        )

    def to_dataframe(self) -> "DataFrame":
        """One row per cell: each axis' label and index, ``value``, ``change`` from the reference,
        and ``standard_error`` where there is one.

        Raises: MissingDependencyError without pandas.
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
        columns["value"] = self.values.cpu().numpy().reshape(-1)
        columns["change"] = columns["value"] - self.reference
        if (error := self.standard_error) is not None:
            columns["standard_error"] = error.cpu().numpy().reshape(-1)
        return pandas.DataFrame(columns)

    # -- showing -----------------------------------------------------------------------------

    def table(self, k: int = 10) -> str:
        """The strongest ``k`` cells as plain text, one a line, under a heading."""
        rows = self._rows(k)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        text = len(self.axes)
        lines = [
            "  ".join(
                cell.ljust(width) if column < text else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self._headline(), *self._facts(), *lines])

    def plot(self, path: str | Path | None = None, **options: Any) -> "Figure":
        """A heatmap, written to ``path`` if given; see `fastlens.plotting.heatmap` for options.

        Raises: MissingDependencyError without matplotlib.
        """
        return importlib.import_module("fastlens.plotting").heatmap(self, path, **options)

    def __repr__(self) -> str:
        return "\n".join([self._headline(), *self._facts(), self._strongest()])

    def _repr_html_(self) -> str:
        head, *rows = self._rows(10)
        cells = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
        cells += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in rows]
        facts = "".join(f"<br>{html.escape(fact)}" for fact in self._facts())
        return (
            f"<p><b>{html.escape(self._headline())}</b>{facts}</p>"
            f"<table><caption>strongest cells</caption>{''.join(cells)}</table>"
        )

    def _headline(self) -> str:
        sizes = " x ".join(
            f"{axis} {size}" for axis, size in zip(self.axes, self.values.shape, strict=True)
        )
        unit = f", {self.unit}" if self.unit else ""
        return f"{self.title or 'Scores'} ({sizes or 'one number'}{unit})"

    def _facts(self) -> list[str]:
        facts = []
        if self.baselines:
            facts.append(", ".join(f"{name} {_short(v)}" for name, v in self.baselines.items()))
        if self.per_example is not None and self.per_example.shape[0] > 1:
            facts.append(f"mean of {self.per_example.shape[0]} examples")
        if self.certificate and "max_difference" in self.certificate:
            facts.append(
                f"checked: {self.certificate.get('runs')} of its runs repeated one at a time, "
                f"max difference {_short(self.certificate['max_difference'])}"
            )
        return facts

    def _strongest(self) -> str:
        cells = [f"{cell.name} {_short(cell.value)}" for cell in self.top(5)]
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
            row = [*names, _short(cell.value)]
            row += [f"{cell.change:+.4g}"] if self.reference else []
            row += [_short(cell.standard_error)] if with_error else []
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
        data = dump_tensors({k: t.detach().cpu().contiguous() for k, t in tensors.items()})
        record = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "unit": self.unit,
            "axes": list(self.axes),
            "labels": self.labels,
            "reference": self.reference,
            "baselines": self.baselines,
            "plan": self.plan,
            "certificate": self.certificate,
            "versions": self.versions,
            "meta": self.meta,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        text = json.dumps(_plain(record), indent=1, ensure_ascii=False) + "\n"
        _write_whole(folder / TENSORS_NAME, data)
        _write_whole(folder / JSON_NAME, text.encode())
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Scores":
        """What `save` wrote.

        Raises: SourceError naming the file that is missing, torn or not ours.
        """
        folder = Path(folder)
        folder = folder.parent if folder.name in (JSON_NAME, TENSORS_NAME) else folder
        record = _read_record(folder / JSON_NAME)
        path = folder / TENSORS_NAME
        data = _read(path)
        if hashlib.sha256(data).hexdigest() != record.get("sha256"):
            raise SourceError(
                f"{path} is not the file {JSON_NAME} was written with: it is torn, or one of the "
                f"two was replaced. Save the scores again."
            )
        try:
            tensors = load_tensors(data)
            fields = {k: record[k] for k in ("title", "unit", "labels", "reference", "baselines")}
            return cls(
                values=tensors["values"],
                axes=tuple(record["axes"]),
                per_example=tensors.get("per_example"),
                plan=record["plan"],
                certificate=record["certificate"],
                meta=record["meta"],
                versions=record["versions"],
                **fields,
            )
        except (SafetensorError, KeyError, TypeError, ShapeError) as error:
            raise SourceError(
                f"{folder / JSON_NAME} does not fit {TENSORS_NAME}: {error}"
            ) from error


def visible(label: str, axis: str = "pos") -> str:
    """A label with its line breaks escaped and, on token axes, its spaces shown as dots.

    >>> visible(" Tower\\n:4")
    '·Tower\\\\n:4'
    """
    escaped = label.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return escaped.replace(" ", "·") if axis.endswith("pos") else escaped


def writable_folder(folder: str | Path) -> Path:
    """The folder, made if needed, after a trial write; so long work can fail before it starts.

    Raises: SourceError if nothing can be written there.
    """
    folder = Path(folder).expanduser()
    trial = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise SourceError(
            f"cannot write into the folder {folder}: {error.strerror or error}. "
            f"Give a folder that you may write to."
        ) from error
    return folder


def _cell_name(axes: tuple[str, ...], labels: tuple[str, ...]) -> str:
    """Labels in one string, a head with its layer: ``L3H7``, ``L3 ·Tower:4``."""
    shown = [visible(label, axis) for axis, label in zip(axes, labels, strict=True)]
    named = dict(zip(axes, shown, strict=True))
    if "layer" in named and "head" in named:
        named["layer"] += named.pop("head")
    return " ".join(named.values())


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


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


def _plain(value: Any) -> Any:
    """The value as JSON types: tensors and arrays become lists, mappings get string keys."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside the file and rename over it, so that no reader sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise SourceError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}.") from error


def _read_record(path: Path) -> dict[str, Any]:
    data = _read(path)
    try:
        record = json.loads(data)
    except ValueError as error:
        raise SourceError(f"{path} is torn or is not JSON: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise SourceError(f"{path} was not written by Scores.save.")
    if record.get("format_version") != FORMAT_VERSION:
        raise SourceError(
            f"{path} has format version {record.get('format_version')}; this fastlens reads "
            f"{FORMAT_VERSION}. Install the version that wrote it: {record.get('versions')}."
        )
    return record
