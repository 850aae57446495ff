"""``fastlens sweep``: activation patching over layers, positions and heads."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

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
    selection,
)
from fastlens.cli.pairs import Pairs, given_pairs, pairs_of_file

METRICS = ("logit_diff", "answer_logit", "answer_prob", "cross_entropy", "kl")


class Direction(str, Enum):
    """Which run is patched into which."""

    denoising = "denoising"
    noising = "noising"


class Mode(Enum):
    """What is done with the new value."""

    replace = "replace"
    add = "add"
    scale = "scale"


def sweep(
    model: ModelOption,
    clean: Annotated[
        list[str] | None,
        typer.Option(help="The prompt whose behaviour is looked for. Several: give it again."),
    ] = None,
    corrupted: Annotated[
        list[str] | None,
        typer.Option(help="The prompt without it, with the same number of tokens."),
    ] = None,
    answer: Annotated[
        list[str] | None,
        typer.Option(help='Right next token of the clean prompt, its space included: " Paris".'),
    ] = None,
    wrong: Annotated[
        list[str] | None, typer.Option(help="Right next token of the corrupted prompt.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Instead: a file of clean TAB corrupted TAB answer TAB wrong, by line."),
    ] = None,
    sites: Annotated[
        str, typer.Option(help="What is patched: resid_pre, attn_out, mlp_out, z, q, ...")
    ] = "resid_pre",
    by: Annotated[
        str | None, typer.Option(help="Axes of the scores, such as layer,pos or layer,head.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Only these: 3, 0,4,-1 or 2:8.")] = None,
    positions: Annotated[str | None, typer.Option(help="Only these.")] = None,
    heads: Annotated[str | None, typer.Option(help="Only these.")] = None,
    neurons: Annotated[str | None, typer.Option(help="Only these.")] = None,
    key_positions: Annotated[
        str | None, typer.Option(help="Only these, of patterns and scores.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Layers patched together around each.")] = 1,
    source: Annotated[
        str, typer.Option(help="New values: other (the other prompt), zero, mean, resample or 0.5.")
    ] = "other",
    mode: Annotated[
        Mode, typer.Option(help="Replace the activation by the new value, add it, or scale by it.")
    ] = Mode.replace,
    direction: Annotated[
        Direction,
        typer.Option(help="denoising patches clean into corrupted, noising the reverse."),
    ] = Direction.denoising,
    metric: Annotated[
        str,
        typer.Option(
            help=f"What is measured at the last position, one or more of {', '.join(METRICS)}."
        ),
    ] = "logit_diff",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="As a fraction: 0 corrupted, 1 clean.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="What may be taken beside the model: 2GiB. [default: half of the free]"),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            help="Runs that are repeated one at a time and compared, or all. [default: 5 % of work]"
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what would be run and its cost; run nothing.")
    ] = False,
    out: OutOption = None,
    no_processing: ProcessingOption = False,
    prepend_bos: BosOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    top: TopOption = 10,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Activation patching over layers, positions and heads.

    Patches every site, one at a time, and measures what that does to the prediction. Prints the
    strongest sites; with --out DIR writes scores.json, scores.safetensors and heatmap.png there,
    and goes on from what an interrupted sweep has left there.
    """
    # All that can be known to be wrong is said before the model is loaded.
    prompts = _prompts(clean, corrupted, answer, wrong, pairs)
    measures = [chosen_metric(name, prompts, normalize) for name in _metric_names(metric)]
    axes = names(by)
    options: dict[str, Any] = {
        "sites": _sites(sites, axes),
        "by": axes,
        "layers": selection(layers, "--layers"),
        "positions": selection(positions, "--positions"),
        "heads": selection(heads, "--heads"),
        "neurons": selection(neurons, "--neurons"),
        "key_positions": selection(key_positions, "--key-positions"),
        "window": window,
        "source": _source(source),
        "mode": mode.value,
        "direction": direction.value,
        "memory": _memory(memory),
        "metric": measures if len(measures) > 1 else measures[0],
    }
    times = _times(verify)
    folder = None if explain else loading.writable(out)
    lens = loading.load_model(model, processing=not no_processing, device=device, dtype=dtype)
    _warn_of_missing_space(lens, prompts)
    from fastlens.patching import execute, plan
    from fastlens.tokens import LocallyOverridenDefaults

    with LocallyOverridenDefaults(lens, prepend_bos=prepend_bos):
        query = plan(lens, *prompts.texts(), **options)
        if explain:
            _print_plan(query, lens, model, json)
            return
        _say_if_begun(folder)
        with output.progress("patching") as bar:
            scores = execute(query, verify=times, out=folder, progress=bar)
    files = output.save(scores, folder)
    if json:
        record = output.scores_record(scores, top)
        output.document({"command": "sweep", "model": model, **record, "files": files})
        return
    typer.echo(loading.described(lens))
    typer.echo(scores.table(top))
    if files:
        typer.echo(output.said_files(files))


def chosen_metric(name: str, prompts: Pairs, normalize: bool) -> Any:
    """The metric of that name with its answers.

    Raises: OptionError if an answer it needs is missing.
    """
    from fastlens import patching

    if name == "kl":
        return patching.kl_divergence(normalize=normalize)
    needed = {"--answer": prompts.answer}
    if name == "logit_diff":
        needed["--wrong"] = prompts.wrong
    for option, given in needed.items():
        if not given:
            raise OptionError(f"--metric {name} needs {option}: give one token.")
    answers = [given[0] if len(given) == 1 else given for given in needed.values()]
    return getattr(patching, name)(*answers, normalize=normalize)


def _prompts(
    clean: Sequence[str] | None,
    corrupted: Sequence[str] | None,
    answer: Sequence[str] | None,
    wrong: Sequence[str] | None,
    pairs: Path | None,
) -> Pairs:
    if pairs is None:
        return given_pairs(clean or (), corrupted or (), answer or (), wrong or ())
    if clean or corrupted:
        raise OptionError("--pairs holds the prompts: leave out --clean and --corrupted.")
    return pairs_of_file(pairs, answer or (), wrong or ())


def _metric_names(metric: str) -> list[str]:
    from fastlens.errors import did_you_mean

    found = names(metric) or []
    for name in found:
        if name not in METRICS:
            near = did_you_mean(name, METRICS)
            raise OptionError(f"no metric {name!r}.{near} Metrics are {', '.join(METRICS)}.")
    if not found or len(set(found)) < len(found):
        raise OptionError(f"--metric {metric!r} is empty or names a metric twice.")
    return found


def _sites(sites: str, axes: Sequence[str] | None) -> str | list[str]:
    from fastlens.errors import SweepError, did_you_mean
    from fastlens.patching.sites import ALIASES, SITES, sweep_axes

    wanted = names(sites) or []
    if not wanted:
        raise OptionError("--sites is empty. Write one, such as resid_pre.")
    for name in wanted:
        plain = name.removeprefix("hook_")
        if plain not in SITES and plain not in ALIASES:
            near = did_you_mean(plain, [*SITES, *ALIASES])
            raise SweepError(f"no site {name!r}.{near} Sites are {', '.join(SITES)}.")
        sweep_axes(SITES[ALIASES.get(plain, plain)], axes)
    return wanted[0] if len(wanted) == 1 else wanted


def _source(source: str) -> str | float:
    from fastlens.errors import did_you_mean
    from fastlens.patching.patch import NAMED

    if source in NAMED:
        return source
    try:
        return float(source)
    except ValueError:
        near = did_you_mean(source, NAMED)
        raise OptionError(
            f"--source {source!r} is none of {', '.join(NAMED)} and no number.{near}"
        ) from None


def _memory(memory: str | None) -> int | None:
    from fastlens.memory import bytes_of

    return None if memory is None else bytes_of(memory)


def _times(verify: str | None) -> Any:
    if verify is None or verify == "all":
        return verify
    if not verify.isdecimal():
        raise OptionError(f"--verify {verify!r} must be a number or all.")
    return int(verify)


def _print_plan(query: Any, lens: Any, model: str, json: bool) -> None:
    if json:
        record = {"plan": query.summary(), "explanation": query.explain()}
        output.document({"command": "sweep", "model": model, **record})
        return
    typer.echo(loading.described(lens))
    typer.echo(query.explain())


def _say_if_begun(folder: Path | None) -> None:
    from fastlens.patching.folder import CHUNKS_NAME

    if folder is None:
        return
    n = len(list((folder / CHUNKS_NAME).glob("[0-9]*.safetensors")))
    if n:
        parts = f"{n} finished part{'s' * (n > 1)}"
        output.note(f"{folder} holds {parts} of a sweep; if it is this one, it goes on from there")


def _warn_of_missing_space(lens: Any, prompts: Pairs) -> None:
    """Words inside a text are tokens with their space; without it they are rarely what is meant."""
    if lens.tokenizer is None or all(prompt[-1:].isspace() for prompt in prompts.clean):
        return
    for answer in dict.fromkeys([*prompts.answer, *prompts.wrong]):
        if not answer or answer[0].isspace() or not answer[0].isalnum():
            continue
        lengths = [
            lens.to_tokens(text, prepend_bos=False).shape[1] for text in (answer, f" {answer}")
        ]
        if lengths == [1, 1]:
            output.note(
                f"warning: {answer!r} is taken as the token without a space in front; "
                f"the next word of a text is usually {' ' + answer!r}"
            )
