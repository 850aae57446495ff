"""A griffe extension: our docstrings in the form that mkdocstrings lays out.

Ours say once what several arguments share (``a, b: text``) and put short sections on the line of
their name (``Raises: SweepError if ...``). Here each argument gets its own row, and a short section
becomes a paragraph.
"""

import re
from typing import Any

import griffe

_GROUP = re.compile(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)+):((?: .*)?(?:\n {8}.*)*)$", re.MULTILINE)
_WRAPPED = re.compile(r"^ {4}((?:\w+, )*\w+,)\n {8}((?:\w+, )*\w+:)", re.MULTILINE)
_SHORT = re.compile(r"^(Raises|Returns|Cost|Yields): (.+(?:\n(?: {4}.*|\S.*))*)", re.MULTILINE)


def laid_out(text: str) -> str:
    """The docstring with one argument an entry and short sections as paragraphs."""
    text = _WRAPPED.sub(r"    \1 \2", text)
    text = _GROUP.sub(
        lambda m: "\n".join(f"    {name}:{m[2]}" for name in m[1].split(", ")),
        text,
    )
    return _SHORT.sub(_paragraph, text)


def _paragraph(found: re.Match[str]) -> str:
    return f"\n**{found[1]}:** " + re.sub(r"\n\s*", "\n", found[2])


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if getattr(obj, "docstring", None):
            obj.docstring.value = laid_out(obj.docstring.value)
