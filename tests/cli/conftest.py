"""A tiny model in a folder, which commands load by its path."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastlens import HookedTransformer
from fastlens.cli import main
from tests.configs import tiny
from tests.fixtures_tokens import gpt2_like
from tests.models import randomise

CLEAN, CORRUPTED = "the cat in a can", "the can in a cat"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2-shaped, two layers, random weights, a byte-level tokenizer."""
    tokenizer = gpt2_like()
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    model = HookedTransformer(tiny("gpt2", d_vocab=len(tokenizer), n_layers=2), tokenizer=tokenizer)
    randomise(model)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command line: exit code, stdout, stderr."""

    def runner(*arguments: Any) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return runner


@pytest.fixture
def run_json(run: Callable[..., Any]) -> Callable[..., Any]:
    """Run a command line with ``--json``: the one document on stdout."""

    def runner(*arguments: Any) -> Any:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return runner


@pytest.fixture
def sweep_line(model_folder: Path) -> list[Any]:
    """A sweep that works, to which tests add."""
    return [
        *("sweep", "--model", model_folder, "--clean", CLEAN, "--corrupted", CORRUPTED),
        *("--answer", " the", "--wrong", " a"),
    ]
