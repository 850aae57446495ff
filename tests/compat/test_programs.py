"""Programs written for TransformerLens run unchanged under `fastlens.compat`, to the same numbers.

They live in `programs/` and import `transformer_lens` only. Each prints what it finds, line by
line; TransformerLens 3.9 and fastlens must print the same.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlens import HookedTransformer

PROGRAMS = Path(__file__).parent / "programs"
NAMES = ["hooks_tour", "induction_circuits", "ioi_path_patching", "main_demo"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The packaged toy model as people keep models: a state dict and a tokenizer's folder."""
    place = tmp_path_factory.mktemp("programs")
    model = HookedTransformer.from_pretrained("toy-induction", verbose=False)
    (place / "toy").mkdir()
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    torch.save(tensors, place / "toy" / "weights.pt")
    model.tokenizer.save_pretrained(place / "toy")
    return place


def printed(*command: Any) -> list[Any]:
    """What a Python process prints: JSON lines read, others as they are."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(s) if s.startswith("{") else s for s in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def by_transformer_lens(folder) -> dict[str, list[Any]]:
    """Program -> what it prints with the real package."""
    found: dict[str, list[Any]] = {}
    for line in printed(PROGRAMS / "run_all.py", folder):
        if isinstance(line, dict) and "program" in line:
            found[line["program"]] = current = []
        else:
            current.append(line)
    return found


def differences(ours: Any, theirs: Any, where: str) -> list[str]:
    """The places where two results differ, numbers by more than rounding."""
    numbers = (int, float)
    if isinstance(theirs, list) and isinstance(ours, list) and len(ours) == len(theirs):
        pairs = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    elif isinstance(theirs, dict) and isinstance(ours, dict) and list(ours) == list(theirs):
        pairs = [(ours[key], theirs[key], f"{where}.{key}") for key in theirs]
    elif isinstance(theirs, numbers) and isinstance(ours, numbers) and not isinstance(ours, bool):
        is_same = math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=2e-5) or ours is theirs
        return [] if is_same else [f"{where}: {ours} and not {theirs}"]
    else:
        return [] if ours == theirs else [f"{where}: {ours} and not {theirs}"]
    return [text for a, b, place in pairs for text in differences(a, b, place)]


@pytest.mark.tl
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_program_finds_the_same(name, folder, by_transformer_lens):
    ours = printed("-m", "fastlens.compat", PROGRAMS / f"{name}.py", folder)
    theirs = by_transformer_lens[name]
    assert len(theirs) > 20
    named = [line.get("name") if isinstance(line, dict) else line for line in ours]
    wanted = [line.get("name") if isinstance(line, dict) else line for line in theirs]
    assert named == wanted
    assert not differences(ours, theirs, name)


def test_every_program_is_run():
    found = {path.stem for path in PROGRAMS.glob("*.py")} - {"run_all", "reporting"}
    assert found == set(NAMES)


def test_differences_are_seen():
    assert differences([1.0, {"a": 2}], [1.0, {"a": 3}], "x") == ["x[1].a: 2 and not 3"]
    assert differences([1.0], [1.0, 2.0], "x") and differences(True, False, "x")
    assert not differences({"a": [0.1 + 0.2, "b"]}, {"a": [0.3, "b"]}, "x")
