"""``fastlens sweep``: activation patching over layers, positions and heads."""

from enum import Enum
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


class MetricName(str, Enum):
    """Metrics by the name they have on the command line."""

    logit_diff = "logit_diff"
    answer_logit = "answer_logit"
    answer_prob = "answer_prob"
    cross_entropy = "cross_entropy"
    kl = "kl"


class Direction(str, Enum):
    """Which run is patched into which."""

    denoising = "denoising"
    noising = "noising"


def sweep(
    model: ModelOption,
    clean: Annotated[str, typer.Option(help="The prompt whose behaviour is looked for.")],
    corrupted: Annotated[
        str, typer.Option(help="The prompt without it, with the same number of tokens.")
    ],
    answer: Annotated[
        str | None,
        typer.Option(help='Right next token of the clean prompt, its space included: " Paris".'),
    ] = None,
    wrong: Annotated[
        str | None, typer.Option(help="Right next token of the corrupted prompt.")
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
    direction: Annotated[
        Direction,
        typer.Option(help="denoising patches clean into corrupted, noising the reverse."),
    ] = Direction.denoising,
    metric: Annotated[
        MetricName, typer.Option(help="What is measured at the last position.")
    ] = MetricName.logit_diff,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="As a fraction: 0 corrupted, 1 clean.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts per forward. [default: what fits]")
    ] = None,
    verify: Annotated[
        str, typer.Option(help="Runs that are repeated one at a time and compared, or all.")
    ] = "1",
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
    strongest sites; with --out DIR writes scores.json, scores.safetensors and heatmap.png there.
    """
    from fastlens.errors import SweepError, did_you_mean
    from fastlens.patching.sites import ALIASES, SITES
    from fastlens.tokens import LocallyOverridenDefaults

    # All that can be known to be wrong is said before the model is loaded.
    folder = loading.writable(out)
    measure = chosen_metric(metric, answer, wrong, normalize)
    wanted = names(sites) or []
    for name in wanted:
        plain = name.removeprefix("hook_")
        if plain not in SITES and plain not in ALIASES:
            near = did_you_mean(plain, [*SITES, *ALIASES])
            raise SweepError(f"no site {name!r}.{near} Sites are {', '.join(SITES)}.")
    options: dict[str, Any] = {
        "sites": wanted[0] if len(wanted) == 1 else wanted,
        "by": names(by),
        "layers": selection(layers, "--layers"),
        "positions": selection(positions, "--positions"),
        "heads": selection(heads, "--heads"),
        "direction": direction.value,
        "batch_size": batch_size,
        "verify": _times(verify),
    }
    lens = loading.load_model(model, processing=not no_processing, device=device, dtype=dtype)
    _warn_of_missing_space(lens, clean, answer, wrong)
    from fastlens.patching import sweep as run

    with (
        LocallyOverridenDefaults(lens, prepend_bos=prepend_bos),
        output.progress("patching") as bar,
    ):
        scores = run(lens, clean, corrupted, metric=measure, out=folder, progress=bar, **options)
    files = output.save(scores, folder)
    if json:
        record = output.scores_record(scores, top)
        output.document({"command": "sweep", "model": model, **record, "files": files})
        return
    typer.echo(loading.described(lens))
    typer.echo(scores.table(top))
    if files:
        typer.echo(output.said_files(files))


def chosen_metric(name: MetricName, answer: str | None, wrong: str | None, normalize: bool) -> Any:
    """The metric of that name with its answers.

    Raises: OptionError if an answer it needs is missing.
    """
    from fastlens import patching

    needed = {
        MetricName.kl: {},
        MetricName.logit_diff: {"--answer": answer, "--wrong": wrong},
    }.get(name, {"--answer": answer})
    for option, value in needed.items():
        if value is None:
            raise OptionError(f"--metric {name.value} needs {option}: give one token.")
    function = "kl_divergence" if name is MetricName.kl else name.value
    return getattr(patching, function)(*needed.values(), normalize=normalize)


def _times(verify: str) -> int | str:
    if verify == "all":
        return "all"
    if not verify.isdigit():
        raise OptionError(f"--verify {verify!r} must be a number or all.")
    return int(verify)


def _warn_of_missing_space(lens: Any, prompt: str, *answers: str | None) -> None:
    """Words inside a text are tokens with their space; without it they are rarely what is meant."""
    if lens.tokenizer is None or prompt[-1:].isspace():
        return
    for answer in answers:
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
