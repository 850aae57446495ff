"""The command line: ``fastlens``, or ``python -m fastlens``. One file per command.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 a user's error (one line on
stderr), 130 interrupted, 1 anything else. Modules here import nothing heavy at the top, so that
``fastlens --help`` is quick.
"""

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fastlens.cli import capture, demo, doctor, heads, models, sweep
from fastlens.errors import FastlensError

USER_ERROR = 2
INTERRUPTED = 130
COMMANDS = (sweep.sweep, heads.heads, capture.capture, models.models, doctor.doctor, demo.demo)

app = typer.Typer(
    name="fastlens",
    help="Interpretability of language models from the command line.",
    no_args_is_help=False,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)


def _print_version(wanted: bool) -> bool:
    if wanted:
        from fastlens import __version__

        typer.echo(f"fastlens {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Without the program's name; by default the process's own.

    Returns: the exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            result = app(arguments, prog_name="fastlens", standalone_mode=False)
            sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read stdout (`| head`) has gone; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
            return USER_ERROR if _is_users(error) else 1
        if not _is_users(error):
            raise
        return _say(f"error: {_sentence(error)}", USER_ERROR)
    # typer turns an interrupt into the code it would exit with.
    if result == INTERRUPTED:
        return _say("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


def _is_users(error: Exception) -> bool:
    """Bad input or a bad path, rather than a fault of ours."""
    # Parse errors: their class moved between versions of typer.
    is_usage = hasattr(error, "format_message") and hasattr(error, "exit_code")
    return is_usage or isinstance(error, (FastlensError, OSError))


def _sentence(error: Exception) -> str:
    if not hasattr(error, "format_message"):
        return str(error)
    context: Any = getattr(error, "ctx", None)
    hint = f" See: {context.command_path} --help" if context is not None else ""
    return f"{error.format_message()}{hint}"  # type: ignore[attr-defined]


def _say(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"fastlens: {message}", file=sys.stderr)
    return code


def _show_warning(message: Any, *args: Any, **kwargs: Any) -> None:
    print(f"fastlens: warning: {message}", file=sys.stderr)
