"""What is printed where."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from fastlens.cli import output
from fastlens.errors import MissingDependencyError
from fastlens.scores import Scores


@pytest.fixture
def scores() -> Scores:
    return Scores(
        torch.tensor([[0.0, 0.9], [math.nan, -0.2]]),
        ("layer", "head"),
        {"layer": ["L0", "L1"], "head": ["H0", "H1"]},
        unit="logits",
    )


def test_a_document_is_valid_json(capsys):
    output.document({"nan": math.nan, "inf": [math.inf], "path": Path("a"), 1: ("ß", None, True)})
    text = capsys.readouterr().out
    assert json.loads(text) == {"nan": None, "inf": [None], "path": "a", "1": ["ß", None, True]}
    assert "NaN" not in text and "ß" in text


def test_notes_go_to_stderr(capsys):
    output.note("hello")
    assert capsys.readouterr() == ("", "fastlens: hello\n")


def test_columns_line_up():
    assert output.columns([["a", "bb"], ["ccc", ""]]) == "  a    bb\n  ccc"


def test_scores_as_a_record(scores):
    record = output.scores_record(scores, 2)
    assert record["strongest"] == [
        {"layer": "L0", "head": "H1", "value": pytest.approx(0.9)},
        {"layer": "L1", "head": "H1", "value": pytest.approx(-0.2)},
    ]
    assert record["axes"] == ("layer", "head") and record["unit"] == "logits"


def test_saving_writes_three_files(scores, tmp_path):
    files = output.save(scores, tmp_path)
    assert [path.name for path in files.values()] == [
        "scores.json",
        "scores.safetensors",
        "heatmap.png",
    ]
    assert files["heatmap"].read_bytes().startswith(b"\x89PNG")
    assert Scores.load(tmp_path).labels == scores.labels
    assert output.said_files(files).count(str(tmp_path)) == 3


def test_saving_nowhere_writes_nothing(scores):
    assert output.save(scores, None) == {} and output.said_files({}) == ""


def test_without_matplotlib_the_scores_are_kept(scores, tmp_path, monkeypatch, capsys):
    def plot(self, *args, **kwargs):
        raise MissingDependencyError("plotting needs matplotlib: pip install matplotlib")

    monkeypatch.setattr(Scores, "plot", plot)
    assert set(output.save(scores, tmp_path)) == {"scores", "tensors"}
    assert "no heatmap: plotting needs matplotlib" in capsys.readouterr().err


def test_scores_that_cannot_be_drawn_are_kept(tmp_path, capsys):
    axes = ("site", "layer", "pos", "head")
    labels = {axis: ["a", "b"] for axis in axes}
    four = Scores(torch.rand(2, 2, 2, 2), axes, labels)
    assert set(output.save(four, tmp_path)) == {"scores", "tensors"}
    assert "no heatmap: " in capsys.readouterr().err
    assert Scores.load(tmp_path).values.equal(four.values)


class Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_short_work_says_nothing(capsys):
    with output.waiting("quick"):
        pass
    assert capsys.readouterr().err == ""


def test_long_work_is_said_once_without_a_terminal(capsys):
    with output.waiting("slow", delay=0.0):
        time.sleep(0.2)
    assert capsys.readouterr().err == "fastlens: slow ...\n"


def test_long_work_has_a_clock_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with output.waiting("slow", delay=0.0):
        time.sleep(0.3)
    assert "slow ... 00:00" in terminal.text


def test_the_clock_stops_when_the_work_fails(capsys):
    with pytest.raises(ZeroDivisionError), output.waiting("slow", delay=0.05):
        raise ZeroDivisionError
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_bars_are_for_terminals(monkeypatch, capsys):
    with output.progress("work") as draws:
        assert draws is False
    monkeypatch.setattr(sys, "stderr", Terminal())
    with output.progress("work") as draws:
        assert draws is True
