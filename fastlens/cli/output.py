"""What commands print: text for people, one JSON document for machines, notes on stderr."""

import contextlib
import json
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from fastlens.scores import Scores

HEATMAP_NAME = "heatmap.png"


def document(record: dict[str, Any]) -> None:
    """The one JSON document of a command; NaN and infinities become null, paths their text."""
    typer.echo(json.dumps(_plain(record), indent=1, ensure_ascii=False, allow_nan=False))


def note(message: str) -> None:
    """A line on stderr, where no program that reads the results sees it."""
    print(f"fastlens: {message}", file=sys.stderr)


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows of text with their columns aligned; the last column may be long."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        indent + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


@contextlib.contextmanager
def waiting(what: str, delay: float = 2.0) -> Iterator[None]:
    """Show on stderr that something of unknown length goes on, once it has taken ``delay`` seconds.

    On a terminal a running clock, elsewhere one line.
    """
    from tqdm import tqdm

    done = threading.Event()

    def show() -> None:
        if done.wait(delay):
            return
        if not sys.stderr.isatty():
            note(f"{what} ...")
            return
        with tqdm(desc=what, bar_format="{desc} ... {elapsed}", leave=False) as clock:
            while not done.wait(0.5):
                clock.refresh()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def progress(what: str) -> Iterator[bool]:
    """Whether the library shall draw its bar: on a terminal. Elsewhere one line is said."""
    if sys.stderr.isatty():
        yield True
        return
    with waiting(what):
        yield False


def save(scores: "Scores", out: Path | None) -> dict[str, Path]:
    """Write scores and heatmap into ``out``: what was written, by kind. Nothing for None.

    Without matplotlib, or with more axes or panels than can be looked at, there is no heatmap, and
    a note says so.
    """
    from fastlens.errors import MissingDependencyError, ShapeError
    from fastlens.scores import JSON_NAME, TENSORS_NAME

    if out is None:
        return {}
    out = scores.save(out)
    files = {"scores": out / JSON_NAME, "tensors": out / TENSORS_NAME}
    try:
        scores.plot(out / HEATMAP_NAME)
    except (MissingDependencyError, ShapeError) as error:
        note(f"no heatmap: {error}")
    else:
        files["heatmap"] = out / HEATMAP_NAME
    return files


def said_files(files: dict[str, Path]) -> str:
    """One line that names the files written, empty if there are none."""
    return f"wrote {', '.join(map(str, files.values()))}" if files else ""


def scores_record(scores: "Scores", k: int) -> dict[str, Any]:
    """Scores as JSON holds them, with their ``k`` strongest cells."""
    error = scores.standard_error
    return {
        "title": scores.title,
        "unit": scores.unit,
        "axes": scores.axes,
        "labels": scores.labels,
        "values": scores.values.tolist(),
        "standard_error": None if error is None else error.tolist(),
        "reference": scores.reference,
        "baselines": scores.baselines,
        "by_metric": scores.by_metric,
        "strongest": [
            {**dict(zip(scores.axes, cell.labels, strict=True)), "value": cell.value}
            for cell in scores.top(k)
        ],
        "certificate": scores.certificate,
        "plan": scores.plan,
        "meta": scores.meta,
        "versions": scores.versions,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
