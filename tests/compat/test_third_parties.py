"""Libraries built on TransformerLens, circuit-tracer and AutoCircuit, unchanged on fastlens.

They ask for versions of other packages that fastlens does not run beside, so they are not in its
test environment. Name an interpreter that has them (installed with ``--no-deps``, and what their
imports need) in FASTLENS_THIRD_PARTY_PYTHON and their programs are run; where that interpreter has
transformer-lens 3 too, it must find the same numbers. Without one the programs are only compiled.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastlens import HookedTransformer
from tests.compat.test_programs import differences

PROGRAMS = Path(__file__).parent / "programs_elsewhere"
ROOT = Path(__file__).parents[2]
# Program -> what it must import, and how many results it has.
NAMES = {
    "circuit_tracer_program": ("circuit_tracer", 221),
    "auto_circuit_program": ("auto_circuit", 266),
}


def interpreter(package: str) -> str | None:
    """The interpreter that has a library: the one that is named, or this one."""
    named = os.environ.get("FASTLENS_THIRD_PARTY_PYTHON")
    return named or (sys.executable if importlib.util.find_spec(package) else None)


def run(python: str, folder: Path, *command: Any) -> subprocess.CompletedProcess[str]:
    """A Python process without network, whose hub cache lies in the folder."""
    # What the interpreter finds by the caller's PYTHONPATH it finds here as well.
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(places),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
    }
    return subprocess.run(
        [python, "-W", "ignore", *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
    )


def results(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a program reports; other lines are the library's own."""
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line["value"] for line in lines}


@pytest.fixture
def folder(tmp_path) -> Path:
    """The toy model's tokenizer."""
    model = HookedTransformer.from_pretrained("toy-induction", verbose=False)
    model.tokenizer.save_pretrained(tmp_path / "toy")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_library_finds_the_same(name, folder):
    program = PROGRAMS / f"{name}.py"
    package, n_results = NAMES[name]
    python = interpreter(package)
    if python is None:
        compile(program.read_text(), str(program), "exec")
        return
    ours = results(run(python, folder, "-m", "fastlens.compat", program, folder))
    assert len(ours) == n_results
    # What holds whoever gives the model: edges of a graph are effects of interventions, say.
    assert [key for key, value in ours.items() if value is False] == []
    assert sum(value is True for value in ours.values()) > 5
    if run(python, folder, "-c", "import transformer_lens").returncode == 0:
        runner = PROGRAMS / "run_with_transformer_lens.py"
        theirs = results(run(python, folder, runner, program, folder))
        assert list(ours) == list(theirs)
        assert not differences(ours, theirs, name)


def test_every_program_is_run():
    found = {path.stem for path in PROGRAMS.glob("*.py")}
    assert found == {*NAMES, "run_with_transformer_lens"}
