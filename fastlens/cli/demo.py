"""``fastlens demo``: the main job on a real model, in one command."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastlens.cli import loading, output
from fastlens.cli.options import DebugOption, JsonOption, TopOption

MODEL = "smollm2-135m"
CLEAN = "The Eiffel Tower is in the city of"
CORRUPTED = "The Colosseum is in the city of"
ANSWER, WRONG = " Paris", " Rome"


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the scores and the heatmap. Made if needed.")
    ] = Path("demo"),
    model: Annotated[
        str, typer.Option("--model", "-m", help="Another model that knows the two places.")
    ] = MODEL,
    top: TopOption = 10,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find where a real model knows the Eiffel Tower's city.

    Activation patching on SmolLM2-135M: the residual stream of the Eiffel Tower prompt is put into
    the Colosseum prompt, at one layer and position at a time. Prints a table, writes a heatmap.
    """
    folder = loading.writable(out)
    _need_packaged(model)
    lens = loading.load_model(model, processing=False)
    from fastlens.patching import logit_diff, sweep
    from fastlens.tokens import LocallyOverridenDefaults

    # SmolLM2's BOS is a chat marker, which makes it less sure of the answer.
    with LocallyOverridenDefaults(lens, prepend_bos=False), output.progress("patching") as bar:
        top_tokens = {
            "clean": _next_token(lens, CLEAN),
            "corrupted": _next_token(lens, CORRUPTED),
        }
        metric = logit_diff(ANSWER, WRONG)
        scores = sweep(lens, CLEAN, CORRUPTED, metric=metric, out=folder, progress=bar)
    files = output.save(scores, folder)
    command = (
        f'fastlens sweep --model {model} --no-processing --no-prepend-bos --clean "{CLEAN}" '
        f'--corrupted "{CORRUPTED}" --answer "{ANSWER}" --wrong "{WRONG}" --out {out}'
    )
    if json:
        record = output.scores_record(scores, top)
        output.document(
            {
                "command": "demo",
                "model": model,
                **record,
                "next_tokens": top_tokens,
                "files": files,
                "same_as": command,
            }
        )
        return
    typer.echo(loading.described(lens))
    rows = [
        [
            f"{name}:",
            repr(text),
            f"next token {top_tokens[name]!r},",
            f"logit{ANSWER} - logit{WRONG} = {scores.baselines[name]:+.2f}",
        ]
        for name, text in (("clean", CLEAN), ("corrupted", CORRUPTED))
    ]
    typer.echo(f"\n{output.columns(rows, indent='')}")
    typer.echo(
        "\nEach run below is the corrupted prompt with the residual stream of one layer and one "
        "position\ntaken from the clean prompt. The further from the corrupted value, the more of "
        "the answer is there.\n"
    )
    typer.echo(scores.table(top))
    typer.echo(f"\nwhere the answer is, layer by layer: {strongest_by_layer(scores)}")
    typer.echo(output.said_files(files))
    typer.echo(f"the same by hand: {command}")


def strongest_by_layer(scores: Any) -> str:
    """The position that matters most in each layer: ``L0-L23 at iffel:2, L24-L29 at of:8``."""
    from fastlens.scores import visible

    best = (scores.values - scores.reference).abs().argmax(1).tolist()
    spans: list[list[Any]] = []
    for layer, position in zip(scores.labels["layer"], best, strict=True):
        if spans and spans[-1][2] == position:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer, position])
    return ", ".join(
        f"{first if first == last else f'{first}-{last}'} at {visible(scores.labels['pos'][pos])}"
        for first, last, pos in spans
    )


def _next_token(lens: Any, prompt: str) -> str:
    import torch

    with torch.no_grad():
        return lens.to_string(lens(prompt)[0, -1].argmax())


def _need_packaged(model: str) -> None:
    """Say what to install before anything is loaded."""
    from fastlens.cli.models import smollm2_problem
    from fastlens.errors import MissingDependencyError
    from fastlens.weights.names import SMOLLM2, packaged_model

    problem = smollm2_problem() if packaged_model(model) == SMOLLM2[0] else None
    if problem is not None:
        raise MissingDependencyError(f"the model {model} is {problem}")
