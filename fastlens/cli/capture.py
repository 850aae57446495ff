"""``fastlens capture``: activations of a text, on disk."""

from pathlib import Path
from typing import Annotated

import typer

from fastlens.cli import loading, output
from fastlens.cli.options import (
    BosOption,
    DebugOption,
    DeviceOption,
    Dtype,
    JsonOption,
    ModelOption,
    OptionError,
    ProcessingOption,
)


def capture(
    model: ModelOption,
    text: Annotated[
        list[Path], typer.Option(help="A file; its lines are documents. Several: give it again.")
    ],
    sites: Annotated[
        str, typer.Option(help="NAME:LAYER or NAME:LAYER:[HEADS]: resid_post:8,pattern:3:[0,5]")
    ],
    out: Annotated[Path, typer.Option(help="Folder. A capture that was stopped goes on there.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="On disk: bf16, fp16, fp32 or int8. [default: the model's]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Tokens in all.")] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in a row, BOS included. [default: the model's, to 1024]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Tokens in a forward, and in a shard.")] = 8192,
    separate: Annotated[
        bool,
        typer.Option("--separate", help="Cut each document by itself, not the text joined by EOS."),
    ] = False,
    model_dtype: Annotated[Dtype, typer.Option(help="Number type of the model.")] = Dtype.float32,
    no_processing: ProcessingOption = False,
    prepend_bos: BosOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write activations of a text to disk.

    Runs the model over the text, up to the last layer asked for, and keeps the activations in a
    folder of safetensors files. A capture that was killed goes on from where it was when it is
    started again with the same options.
    """
    from fastlens.store.text import TOKENS, capture_text, checked_dtype

    for file in text:
        if not file.is_file():
            raise OptionError(f"--text {file} is no file.")
    checked_dtype(dtype)
    lens = loading.load_model(model, processing=not no_processing, device=device, dtype=model_dtype)
    with output.progress("capturing") as bar:
        store = capture_text(
            lens,
            text,
            sites,
            out,
            dtype=dtype,
            context=context,
            batch=batch,
            limit=limit,
            join=not separate,
            prepend_bos=prepend_bos,
            progress=bar,
        )
    n_tokens = sum(s.places[TOKENS].nbytes // 4 for s in store.shards)
    n_bytes = sum(s.nbytes for s in store.shards)
    if json:
        record = {"tokens": n_tokens, "bytes": n_bytes, "shards": len(store), "folder": str(out)}
        output.document({"command": "capture", "model": model, **record, **store.key})
        return
    typer.echo(loading.described(lens))
    for name in store.names():
        typer.echo(f"  {name}")
    typer.echo(f"wrote {n_tokens:,} tokens, {n_bytes:,} bytes in {len(store)} shards to {out}")
