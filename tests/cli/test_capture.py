"""``fastlens capture``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastlens.store import Store


@pytest.fixture
def line(model_folder: Path, tmp_path: Path) -> list[Any]:
    (tmp_path / "text.txt").write_text("the cat in a can\nthe can in a cat\n" * 20)
    return [
        *("capture", "--model", model_folder, "--text", tmp_path / "text.txt"),
        *("--sites", "resid_post:1,pattern:0:[0]", "--dtype", "bf16", "--context", 8),
        *("--batch", 64, "--out", tmp_path / "out"),
    ]


def test_it_writes_and_says_what(run: Callable[..., Any], line: list[Any], tmp_path: Path):
    code, out, err = run(*line, "--limit", 200)
    assert code == 0, err
    assert "blocks.1.hook_resid_post" in out and "wrote 200 tokens" in out
    store = Store.open(tmp_path / "out")
    assert store.verify() == []
    assert store.read("blocks.0.attn.hook_pattern", 0).shape[1] == 1


def test_json_and_going_on(run_json: Callable[..., Any], line: list[Any]):
    first = run_json(*line)
    assert first["dtype"] == "bfloat16" and first["tokens"] > 200
    assert run_json(*line) == first


def test_errors_are_one_line(run: Callable[..., Any], line: list[Any], tmp_path: Path):
    assert run(*line)[0] == 0
    code, _, err = run(*line, "--context", 4)
    assert code == 2 and "context: 8 there, 4 here" in err and err.count("\n") < 4
    code, _, err = run(*line, "--text", tmp_path / "none")
    assert code == 2 and "is no file" in err
    code, _, err = run(*line, "--dtype", "int4")
    assert code == 2 and "int4" in err
