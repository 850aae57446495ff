"""Options that several commands share, and what their texts mean."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastlens.errors import FastlensError


class OptionError(FastlensError, ValueError):
    """An option's text, or a combination of options, makes no sense."""


class Dtype(str, Enum):
    """Number types a model can be loaded in."""

    float32 = "float32"
    float64 = "float64"
    float16 = "float16"
    bfloat16 = "bfloat16"


ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Name, folder or .gguf file. `fastlens models` lists names."
    ),
]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder for the scores and a heatmap. Made if needed.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, ...; by default cuda if there is one.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Number type of the model.")]
ProcessingOption = Annotated[
    bool,
    typer.Option(
        "--no-processing", help="Leave the weights as they are: no folding, no centering."
    ),
]
BosOption = Annotated[
    bool | None,
    typer.Option(
        "--prepend-bos/--no-prepend-bos",
        help="Put a BOS token before the text, or not. [default: the model's own]",
        show_default=False,
    ),
]
TopOption = Annotated[int, typer.Option(min=1, help="Rows in the printed table.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")]


def selection(text: str | None, option: str) -> int | slice | list[int] | None:
    """Which indices ``"3"``, ``"0,4,-1"`` or ``"2:8"`` (2 to 7) mean; None for None.

    Raises: OptionError for anything else.
    """
    if text is None:
        return None
    try:
        if ":" not in text:
            return [int(part) for part in text.split(",")]
        ends = [int(part) if part.strip() else None for part in text.split(":")]
        if len(ends) <= 3:
            return slice(*ends)
    except ValueError:
        pass
    raise OptionError(
        f"{option} {text!r} is not a selection. Write 3, 0,4,-1 or 2:8 (which is 2 to 7)."
    )


def names(text: str | None) -> list[str] | None:
    """The names in a list with commas; None for None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
