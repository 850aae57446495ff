"""``fastlens heads``: which heads are induction, previous-token and duplicate-token heads."""

from typing import Annotated

import typer

from fastlens.cli import loading, output
from fastlens.cli.options import (
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    OutOption,
    ProcessingOption,
    TopOption,
    names,
)


def heads(
    model: ModelOption,
    kinds: Annotated[
        str | None,
        typer.Option(help="Some of induction,previous_token,duplicate_token. [default: all]"),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Random tokens, which are then repeated once.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Random sequences to average.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    out: OutOption = None,
    no_processing: ProcessingOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    top: TopOption = 5,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score every head by where it looks on random tokens that are repeated once.

    A score is the mean attention that goes to the token after the previous occurrence
    (induction), to the token before (previous_token), or to the previous occurrence
    (duplicate_token): 0 to 1.
    """
    from fastlens.analysis.head_scores import head_scores

    folder = loading.writable(out)
    chosen = {"kinds": names(kinds), "seq_len": seq_len, "batch": batch}
    options = {name: value for name, value in chosen.items() if value is not None}
    lens = loading.load_model(model, processing=not no_processing, device=device, dtype=dtype)
    with output.waiting("scoring heads"):
        scores = head_scores(lens, seed=seed, **options)
    files = output.save(scores, folder)
    parts = {kind: scores.select(kind=kind) for kind in scores.labels["kind"]}
    if json:
        record = output.scores_record(scores, top)
        record["strongest"] = {
            kind: output.scores_record(part, top)["strongest"] for kind, part in parts.items()
        }
        output.document({"command": "heads", "model": model, **record, "files": files})
        return
    typer.echo(loading.described(lens))
    for kind, part in parts.items():
        typer.echo(f"\n{kind}")
        rows = [[cell.name, f"{cell.value:.3f}"] for cell in part.top(top)]
        typer.echo(output.columns(rows))
    if files:
        typer.echo(f"\n{output.said_files(files)}")
