"""Bars: order, length, intervals, and what stands beside them. All through `Scores.plot`."""

import itertools
import re

import numpy as np
import pytest
import torch

from fastlens.bars import MAX_BARS, MAX_NAME, MAX_ORDERED, Bars
from fastlens.errors import ShapeError
from fastlens.plotting import plot
from fastlens.scores import Scores

matplotlib = pytest.importorskip("matplotlib")

RUNS = ["L9H9 + L10H0", "all MLPs", "L0 zeroed", "nothing"]


def runs(**changes):
    values = changes.pop("values", torch.tensor([0.5, 3.0, -2.5, 1.0]))
    fields = {"labels": {"run": list(RUNS)}, "unit": "logits", "reference": 1.0, **changes}
    return Scores(values, ("run",), **fields)


def texts(labels):
    return [label.get_text() for label in labels]


def only_axes(figure):
    [ax] = figure.axes
    return ax


def lengths(ax):
    """Start and signed length of each bar, from the first one on."""
    [bars] = [c for c in ax.containers if isinstance(c, matplotlib.container.BarContainer)]
    return [(bar.get_x(), bar.get_width()) for bar in bars]


def spans(ax):
    """Ends of the error lines."""
    [collection] = [
        c for c in ax.collections if isinstance(c, matplotlib.collections.LineCollection)
    ]
    return np.array([np.sort(line[:, 0]) for line in collection.get_segments()])


def test_runs_are_bars_from_the_reference_strongest_first():
    ax = only_axes(runs().plot(title="four runs"))
    assert texts(ax.get_yticklabels()) == ["L0 zeroed", "all MLPs", "L9H9 + L10H0", "nothing"]
    assert lengths(ax) == [(1.0, -3.5), (1.0, 2.0), (1.0, -0.5), (1.0, 0.0)]
    low, high = ax.get_ylim()
    assert low > high, "the strongest is on top"
    assert ax.get_xlabel() == "logits"
    assert ax.figure.get_suptitle() == "four runs"
    red, blue = (ax.patches[i].get_facecolor() for i in (0, 1))
    assert red[0] > red[2] and blue[2] > blue[0]


def test_numbers_stand_beside_the_bars():
    assert texts(only_axes(runs().plot()).texts) == ["-2.50", "3.00", "0.50", "1.00"]
    assert not only_axes(runs().plot(values=False)).texts


def test_lines_show_the_interval_of_the_mean():
    per_example = torch.tensor([0.5, 3.0, -2.5, 1.0]) + torch.randn(12, 4)
    scores = runs(values=per_example.mean(0), per_example=per_example)
    ax = only_axes(scores.plot())
    order = [cell.index[0] for cell in scores.top()]
    low, high = scores.interval(0.95)
    expected = torch.stack([low[order], high[order]], 1)
    assert np.allclose(spans(ax), expected.numpy(), atol=1e-5)
    assert ax.get_xlabel() == "logits\nmean of 12 examples, 95% interval"
    # All of every line is inside.
    left, right = ax.get_xlim()
    assert left < spans(ax).min() and spans(ax).max() < right


def test_one_example_has_no_line():
    ax = only_axes(runs(per_example=torch.zeros(1, 4)).plot())
    assert "interval" not in ax.get_xlabel()
    assert not ax.collections


def test_the_strongest_of_many():
    values = torch.arange(100.0)
    figure = Scores(values, ("head",)).plot()
    ax = only_axes(figure)
    assert len(lengths(ax)) == MAX_BARS
    assert texts(ax.get_yticklabels())[0] == "99"
    assert ax.get_xlabel() == f"the {MAX_BARS} strongest of 100"


@pytest.mark.parametrize("axis", ["layer", "pos", "query_pos"])
def test_what_follows_one_another_keeps_its_order(axis):
    labels = {axis: ["a:0", " b:1", "c:2"]}
    scores = Scores(torch.tensor([1.0, -3.0, 2.0]), (axis,), labels, unit="nats")
    ax = only_axes(scores.plot())
    assert [bar.get_height() for bar in ax.patches] == [1.0, -3.0, 2.0]
    assert texts(ax.get_xticklabels())[1] == (" b:1" if axis == "layer" else "·b:1")
    assert ax.get_ylabel() == "nats"
    assert not ax.texts
    assert texts(only_axes(scores.plot(values=True)).texts) == ["1.00", "-3.00", "2.00"]


def test_upright_bars_have_intervals_too():
    per_example = torch.randn(8, 3)
    scores = Scores(per_example.mean(0), ("layer",), per_example=per_example, reference=0.5)
    ax = only_axes(scores.plot())
    [collection] = ax.collections
    ends = np.array([np.sort(line[:, 1]) for line in collection.get_segments()])
    assert np.allclose(ends, torch.stack(scores.interval(), 1).numpy(), atol=1e-5)
    assert [bar.get_y() for bar in ax.patches] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("n", [1, 64, 300])
def test_labels_of_long_prompts_do_not_overlap(n):
    scores = Scores(torch.randn(n), ("pos",), {"pos": [f" token{i}:{i}" for i in range(n)]})
    figure = scores.plot()
    figure.canvas.draw()
    ax = only_axes(figure)
    labels = ax.get_xticklabels()
    places = [label.get_transform().transform(label.get_position())[0] for label in labels]
    needed = labels[0].get_fontsize() * figure.dpi / 72
    assert all(b - a >= needed for a, b in itertools.pairwise(places))
    assert figure.get_figwidth() < 15


def test_too_many_to_draw():
    with pytest.raises(ShapeError, match=re.escape(f"pos=slice(0, {MAX_ORDERED})")):
        Scores(torch.zeros(MAX_ORDERED + 1), ("pos",)).plot()
    assert len(Bars.of(Scores(torch.zeros(5000), ("neuron",))).numbers) == MAX_BARS


def test_baselines_are_named_where_they_lie():
    ax = only_axes(runs(baselines={"clean": 3.5, "corrupted": 1.0, "far": 50.0}).plot())
    named = {text.get_text(): text.xy[0] for text in ax.texts if text.xy[1] == 1}
    assert {name: named[name] for name in ("clean", "corrupted")} == {
        "clean": 3.5,
        "corrupted": 1.0,
    }
    assert "far" not in named
    assert ax.get_xlim()[1] > 3.5


def test_numbers_that_are_none(tmp_path):
    values = torch.tensor([float("nan"), 2.0, float("inf"), -1.0])
    per_example = values.expand(3, 4) + torch.arange(3.0)[:, None]
    scores = runs(values=values, per_example=per_example)
    ax = only_axes(scores.plot(tmp_path / "bars.png"))
    assert texts(ax.texts) == ["inf", "-1.00", "2.00", "nan"]
    assert np.isfinite(ax.get_xlim()).all()


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan")])
def test_bars_of_equal_numbers(value, tmp_path):
    runs(values=torch.full((4,), value), reference=value).plot(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_any_text_can_be_drawn(tmp_path):
    labels = {"run": ["$x$", "中文", "\x00\x85", "name " * 20]}
    ax = only_axes(runs(labels=labels, unit="$u$", title="$ 中").plot(tmp_path / "bars.png"))
    drawn = texts(ax.get_yticklabels())
    assert {"$x$", "\\u4e2d\\u6587", "\\x00\\x85"} < set(drawn)
    assert max(map(len, drawn)) <= MAX_NAME


def test_metrics_are_panels_with_their_own_scale_and_order():
    values = torch.stack([torch.tensor([0.5, 3.0, -2.5, 1.0]), torch.tensor([9.0, 7.0, 8.0, 0.0])])
    scores = Scores(
        values,
        ("metric", "run"),
        {"metric": ["logit difference", "KL"], "run": list(RUNS)},
        title="two metrics",
        by_metric={
            "logit difference": {"unit": "logits", "reference": 1.0},
            "KL": {"unit": "nats"},
        },
    )
    left, right = scores.plot().axes
    assert (left.get_title(), right.get_title()) == ("logit difference", "KL")
    assert (left.get_xlabel(), right.get_xlabel()) == ("logits", "nats")
    assert texts(left.get_yticklabels())[0] == "L0 zeroed"
    assert texts(right.get_yticklabels())[0] == "L9H9 + L10H0"
    assert lengths(right)[0] == (0.0, 9.0)
    assert left.get_xlim() != right.get_xlim()
    assert left.figure.get_suptitle() == "two metrics"


def test_your_own_axes():
    figure = matplotlib.figure.Figure()
    ax = figure.subplots()
    assert plot(runs(title="mine"), ax=ax) is figure
    assert ax.get_title() == "mine"
    assert len(ax.patches) == 4
    two = Scores(torch.zeros(2, 4), ("metric", "run"))
    with pytest.raises(ShapeError, match="one panel"):
        two.plot(ax=ax)
    one = Scores(torch.zeros(1, 4), ("metric", "run"), {"metric": ["KL"]}, title="runs")
    one.plot(ax=ax)
    assert ax.get_title() == "runs, KL"
