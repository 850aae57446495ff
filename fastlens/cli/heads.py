"""``fastlens heads``: which heads are induction, previous-token and duplicate-token heads."""

from typing import Annotated

import typer

from fastlens.cli import loading, output
from fastlens.cli.options import (
    BosOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    OptionError,
    OutOption,
    ProcessingOption,
    TopOption,
    names,
)

KINDS = ("induction", "previous_token", "duplicate_token")


def heads(
    model: ModelOption,
    kinds: Annotated[
        str | None,
        typer.Option(help="Some of induction,previous_token,duplicate_token. [default: all]"),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Random tokens, which are then repeated. [default: 50, or what fits]",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Random sequences to average over.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    out: OutOption = None,
    no_processing: ProcessingOption = False,
    prepend_bos: BosOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    top: TopOption = 5,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find induction, previous-token and duplicate-token heads.

    Every head is scored by where it looks on random tokens that are repeated once: the mean
    attention, 0 to 1, that goes to the token after the previous occurrence (induction), to the
    token before (previous_token), or to the previous occurrence (duplicate_token).
    """
    from fastlens.analysis.head_scores import head_scores
    from fastlens.errors import did_you_mean
    from fastlens.tokens import LocallyOverridenDefaults

    folder = loading.writable(out)
    wanted = names(kinds) or list(KINDS)
    for kind in wanted:
        if kind not in KINDS:
            raise OptionError(
                f"--kinds {kind!r} is not a kind of head: {', '.join(KINDS)}."
                f"{did_you_mean(kind, KINDS)}"
            )
    lens = loading.load_model(model, processing=not no_processing, device=device, dtype=dtype)
    with LocallyOverridenDefaults(lens, prepend_bos=prepend_bos), output.waiting("scoring heads"):
        scores = head_scores(lens, kinds=wanted, seq_len=seq_len, batch=batch, seed=seed)
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
    losses = [scores.meta[f"loss_{half}_half"] for half in ("first", "second")]
    typer.echo(
        f"{scores.meta['seq_len']} random tokens, repeated, {batch} times over: loss per token "
        f"{losses[0]:.2f} at first, {losses[1]:.2f} in the repetition"
    )
    for kind, part in parts.items():
        typer.echo(f"\n{kind}")
        rows = [[cell.name, f"{cell.value:.3f}"] for cell in part.top(top)]
        typer.echo(output.columns(rows))
    if files:
        typer.echo(f"\n{output.said_files(files)}")
