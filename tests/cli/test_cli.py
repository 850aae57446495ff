"""The entry point: exit codes, where messages go, and what is imported."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fastlens
from fastlens import cli
from fastlens.errors import ConfigError

ROOT = Path(__file__).parents[2]


def process(*command: str, **options) -> subprocess.CompletedProcess:
    """A command in a process of its own, outside the repository."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, **options
    )


def replace_doctor(monkeypatch: pytest.MonkeyPatch, what: BaseException) -> None:
    """Let the command ``doctor`` raise ``what``."""

    def raising() -> dict[str, str]:
        raise what

    monkeypatch.setattr("fastlens.cli.doctor.versions", raising)


def test_without_arguments_help_is_shown(run):
    code, out, err = run()
    assert code == 0 and not err
    assert "Usage: fastlens" in out
    for command in cli.COMMANDS:
        assert command.__name__ in out
    assert "..." not in out.split("Commands:")[1], "a summary is cut off"


def test_every_command_has_help(run):
    for command in cli.COMMANDS:
        code, out, _ = run(command.__name__, "--help")
        assert code == 0 and f"Usage: fastlens {command.__name__}" in out
        assert "--json" in out and "--debug" in out


def test_version(run):
    assert run("--version") == (0, f"fastlens {fastlens.__version__}\n", "")


def test_python_m_fastlens(tmp_path):
    result = process("-m", "fastlens", "--version", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"fastlens {fastlens.__version__}\n")
    wrong = process("-m", "fastlens", "swep", cwd=tmp_path)
    assert wrong.returncode == 2 and not wrong.stdout


def test_help_loads_nothing_heavy(tmp_path):
    probe = (
        "import sys; from fastlens.cli import main; code = main(['sweep', '--help'])\n"
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = process("-c", probe, cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "0 []", result.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["swep"], "No such command 'swep'"),
        (["sweep", "--sitse", "z"], "No such option: --sitse"),
        (["sweep", "--clean", "a"], "Missing option"),
        (["doctor", "extra"], "extra"),
        (["heads", "--model", "m", "--batch", "many"], "'--batch'"),
    ],
)
def test_a_wrong_command_line_is_one_line_on_stderr(run, line, said):
    code, out, err = run(*line)
    assert code == cli.USER_ERROR == 2 and not out
    assert err.startswith("fastlens: error: ") and err.count("\n") == 1
    assert said in err and "--help" in err


def test_our_errors_and_bad_paths_exit_with_2(run, monkeypatch):
    replace_doctor(monkeypatch, ConfigError("this - that - do so"))
    assert run("doctor") == (2, "", "fastlens: error: this - that - do so\n")
    replace_doctor(monkeypatch, PermissionError(13, "Permission denied", "some/file"))
    code, out, err = run("doctor")
    assert code == 2 and not out and "Permission denied" in err and "some/file" in err


def test_debug_shows_the_traceback(run, monkeypatch):
    replace_doctor(monkeypatch, ConfigError("asked, found, do"))
    code, _, err = run("doctor", "--debug")
    assert code == 2
    assert "Traceback" in err and "in raising" in err and "ConfigError: asked, found, do" in err


def test_our_own_faults_are_not_dressed_up(run, monkeypatch):
    replace_doctor(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        run("doctor")
    code, _, err = run("doctor", "--debug")
    assert code == 1 and "ZeroDivisionError: a bug" in err


def test_interrupted(run, monkeypatch):
    replace_doctor(monkeypatch, KeyboardInterrupt())
    assert run("doctor") == (cli.INTERRUPTED, "", "fastlens: interrupted\n")
    assert cli.INTERRUPTED == 130


def test_warnings_are_one_line(run, monkeypatch):
    def warning() -> dict[str, str]:
        warnings.simplefilter("always")
        warnings.warn("mind the gap", UserWarning, stacklevel=1)
        return {}

    monkeypatch.setattr("fastlens.cli.doctor.versions", warning)
    monkeypatch.setattr("fastlens.cli.output.columns", lambda rows: "")
    before = warnings.showwarning
    code, _, err = run("doctor")
    assert (code, err) == (0, "fastlens: warning: mind the gap\n")
    assert warnings.showwarning is before


def test_a_reader_that_goes_away_gets_no_traceback(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-m", "fastlens", "models"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    err = writer.stderr.read().decode()
    writer.stderr.close()
    assert writer.wait() == 1 and not err
