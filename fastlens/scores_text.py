"""How `Scores` are written: labels, names of cells, numbers, and tables as text and as HTML."""

import html
import unicodedata
from collections.abc import Sequence
from typing import Any


def visible(label: str, axis: str = "pos") -> str:
    """A label with its control characters escaped and, on token axes, its spaces shown as dots.

    >>> visible(" Tower\\n:4")
    '·Tower\\\\n:4'
    """
    names = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    escaped = "".join(
        char if char.isprintable() else names.get(char) or code_point(char) for char in label
    )
    return escaped.replace(" ", "·") if axis.endswith("pos") else escaped


def code_point(char: str) -> str:
    """A character as Python would escape it: ``\\x1b``, ``\\u4e2d``."""
    number = ord(char)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def cell_name(axes: Sequence[str], labels: Sequence[str]) -> str:
    """Labels in one string, a head with its layer: ``L3H7``, ``L3 ·Tower:4``."""
    shown = [visible(label, axis) for axis, label in zip(axes, labels, strict=True)]
    named = dict(zip(axes, shown, strict=True))
    if "layer" in named and "head" in named:
        named["layer"] += named.pop("head")
    return " ".join(named.values())


def short(value: Any) -> str:
    """A number in four digits; nothing for None; anything else as it prints."""
    if value is None:
        return ""
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)


def text_table(rows: Sequence[Sequence[str]], n_names: int) -> list[str]:
    """Lines with aligned columns: the first ``n_names`` to the left, numbers to the right."""
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            _padded(cell, width, left=column < n_names)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def html_table(rows: Sequence[Sequence[str]], n_names: int, caption: str) -> str:
    """The same as an HTML table, everything in it escaped; the first row is its head."""

    def line(row: Sequence[str], tag: str) -> str:
        sides = ["left" if i < n_names else "right" for i in range(len(row))]
        return "".join(
            f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
            for side, cell in zip(sides, row, strict=True)
        )

    head, *body = rows
    lines = "".join(f"<tr>{line(row, 'td')}</tr>" for row in body)
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{line(head, 'th')}</tr>"
        f"</thead><tbody>{lines}</tbody></table>"
    )


def _padded(cell: str, width: int, *, left: bool) -> str:
    space = " " * (width - _width(cell))
    return cell + space if left else space + cell


def _width(text: str) -> int:
    """Columns in a terminal: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )
