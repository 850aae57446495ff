"""The tutorials run from top to bottom, and say what their stored outputs say."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
NAMES = sorted(path.stem for path in TUTORIALS.glob("*.ipynb"))
_NUMBER = re.compile(r"-?\d[\d.,e+-]*(?: [KMG]iB)?")


def said(cell: Any) -> list[str]:
    """The words of a cell's outputs: numbers vary in their last digits from machine to machine."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            texts.append(output.text)
        elif "data" in output:
            texts.append(output.data.get("text/plain", ""))
    words = _NUMBER.sub("#", "".join(texts)).split()
    # What comes first of two close ones, and how wide a column is, may vary as well.
    return sorted({word for word in words if word.isalpha() and len(word) > 3})


# One in every run; `examples/`, which are run as well, do what most others do.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name == "main_demo" else pytest.param(name, marks=pytest.mark.full) for name in NAMES],
)
def test_a_tutorial_runs(name, tmp_path):
    import nbformat

    # In a process of its own, which closes the kernel's sockets in its own time.
    command = [
        *(sys.executable, "-W", "ignore", "-m", "nbconvert", "--to", "notebook", "--execute"),
        *(TUTORIALS / f"{name}.ipynb", "--output-dir", tmp_path),
    ]
    environment = {"PYTHONPATH": str(TUTORIALS.parents[1]), "IPYTHONDIR": str(tmp_path / "ipython")}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    stored, found = (
        [said(cell) for cell in nbformat.read(path, as_version=4).cells if "outputs" in cell]
        for path in (TUTORIALS / f"{name}.ipynb", tmp_path / f"{name}.ipynb")
    )
    assert any(stored), "the tutorial was stored without its outputs"
    assert found == stored


def test_all_tutorials_are_there():
    assert NAMES == [
        "activation_patching", "induction_heads", "ioi", "logit_lens", "main_demo", "sae",
    ]  # fmt: skip
