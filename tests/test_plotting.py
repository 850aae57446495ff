"""Heatmaps: what is drawn, with which colours and labels, and what is left alone."""

import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastlens.errors import MissingDependencyError, ShapeError, SourceError
from fastlens.figures import MAX_LABEL
from fastlens.plotting import MAX_ENTRIES, MAX_PANELS, heatmap, plot
from fastlens.scores import Scores

matplotlib = pytest.importorskip("matplotlib")


def token_map(n_layers=4, tokens=("The:0", " Eif/ Col:1", "\n:2"), **changes):
    values = torch.arange(float(n_layers * len(tokens))).reshape(n_layers, len(tokens))
    labels = {"layer": [f"L{i}" for i in range(n_layers)], "pos": list(tokens)}
    fields = {"unit": "logits", "title": "denoising resid_pre", **changes}
    return Scores(values, ("layer", "pos"), labels, **fields)


def texts(labels):
    return [label.get_text() for label in labels]


def panels(figure):
    """All axes but the colour bar, which comes last."""
    return [ax for ax in figure.axes[:-1] if ax.axison]


def image(ax):
    return np.asarray(ax.images[0].get_array())


def test_layers_go_up_and_positions_right():
    scores = token_map()
    ax = panels(heatmap(scores))[0]
    assert np.array_equal(image(ax), scores.values.double().numpy())
    assert ax.images[0].origin == "lower"
    assert texts(ax.get_yticklabels()) == ["L0", "L1", "L2", "L3"]
    assert texts(ax.get_xticklabels()) == ["The:0", "·Eif/·Col:1", "\\n:2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("position", "layer")


def test_layers_go_up_whatever_the_order_of_axes():
    scores = Scores(torch.randn(2, 5), ("head", "layer"))
    ax = panels(heatmap(scores))[0]
    assert np.array_equal(image(ax), scores.values.double().numpy().T)
    assert ax.get_ylabel() == "layer"


def test_query_positions_read_downwards():
    ax = panels(heatmap(Scores(torch.randn(3, 3), ("query_pos", "key_pos"))))[0]
    assert ax.images[0].origin == "upper"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key position", "query position")


def test_white_is_the_reference_and_the_scale_is_symmetric():
    scores = token_map(reference=2.0, baselines={"clean": 20.0, "corrupted": 2.0})
    figure = heatmap(scores)
    drawn = panels(figure)[0].images[0]
    assert drawn.get_clim() == (2.0 - 9.0, 2.0 + 9.0)
    assert drawn.cmap(drawn.norm(2.0))[:3] == pytest.approx((0.965, 0.968, 0.968), abs=0.01)
    # The bar shows what occurs, and the baseline that lies in it.
    bar = figure.axes[-1]
    assert bar.get_ylim() == (0.0, 11.0)
    assert bar.get_ylabel() == "logits"
    assert texts(bar.texts) == ["corrupted"]


def test_a_baseline_just_beyond_the_scores_is_shown():
    figure = heatmap(token_map(baselines={"clean": 12.0}))
    assert panels(figure)[0].images[0].get_clim() == (-12.0, 12.0)
    assert texts(figure.axes[-1].texts) == ["clean"]


def test_numbers_that_are_none():
    values = torch.tensor([[1.0, float("nan")], [-2.0, float("inf")]])
    drawn = panels(heatmap(Scores(values, ("layer", "head"))))[0]
    assert drawn.images[0].get_clim() == (-2.0, 2.0)
    assert texts(drawn.texts) == ["1.00", "-2.00"]
    bad = drawn.images[0].cmap.get_bad()
    assert bad[0] == bad[1] == bad[2] == pytest.approx(0.8)


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan")])
def test_a_map_of_equal_numbers_is_drawn(value, tmp_path):
    scores = Scores(torch.full((2, 2), value), ("layer", "head"), reference=value)
    heatmap(scores, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_values_are_written_where_they_fit():
    small = Scores(torch.tensor([[-0.001, 123.4]]), ("layer", "head"))
    assert texts(panels(heatmap(small))[0].texts) == ["0.00", "123"]
    assert not panels(heatmap(small, values=False))[0].texts
    large = Scores(torch.zeros(40, 40), ("layer", "pos"))
    assert not panels(heatmap(large))[0].texts
    assert len(panels(heatmap(large, values=True))[0].texts) == 1600


def test_one_axis_is_one_row():
    ax = panels(heatmap(Scores(torch.randn(5), ("layer",))))[0]
    assert image(ax).shape == (1, 5)
    assert ax.get_xlabel() == "layer"


def test_three_axes_become_panels():
    labels = {"kind": ["induction", "previous_token"]}
    scores = Scores(torch.randn(2, 3, 4), ("kind", "layer", "head"), labels, title="heads")
    figure = heatmap(scores)
    drawn = panels(figure)
    assert [ax.get_title() for ax in drawn] == ["induction", "previous_token"]
    for ax, values in zip(drawn, scores.values, strict=True):
        assert np.array_equal(image(ax), values.double().numpy())
    assert drawn[0].images[0].get_clim() == drawn[1].images[0].get_clim()
    assert figure.get_suptitle() == "heads"
    assert texts(drawn[0].get_yticklabels()) == ["0", "1", "2"]
    assert not drawn[1].get_yticklabels()


def test_the_panel_axis_can_be_chosen():
    scores = Scores(torch.randn(2, 3, 4), ("layer", "pos", "head"))
    assert len(panels(heatmap(scores))) == 4
    assert len(panels(heatmap(scores, panel="pos"))) == 3
    assert len(panels(heatmap(scores.select(head=0), panel="pos"))) == 3


def metric_maps(*sizes):
    axes = ("metric", "layer", "pos")[: len(sizes) + 1]
    values = torch.stack([torch.randn(sizes), 100 + torch.rand(sizes)])
    return Scores(
        values,
        axes,
        {"metric": ["logit difference", "KL"]},
        title="both",
        by_metric={
            "logit difference": {"unit": "logits", "baselines": {"clean": 0.5}},
            "KL": {"unit": "nats", "reference": 100.0, "baselines": {"clean": 100.25}},
        },
    )


def test_metrics_are_panels_each_on_its_own_scale():
    scores = metric_maps(3, 4)
    figure = scores.plot()
    drawn = [ax for ax in figure.axes if ax.images and ax.get_title()]
    assert [ax.get_title() for ax in drawn] == ["logit difference", "KL"]
    for ax, values, middle in zip(drawn, scores.values, (0.0, 100.0), strict=True):
        assert np.array_equal(image(ax), values.double().numpy())
        low, high = ax.images[0].get_clim()
        assert (low + high) / 2 == pytest.approx(middle)
        assert middle + float((values - middle).abs().max()) <= high + 1e-6
    bars = [ax for ax in figure.axes if ax not in drawn]
    assert [bar.get_ylabel() for bar in bars] == ["logits", "nats"]
    assert [texts(bar.texts) for bar in bars] == [["clean"], ["clean"]]
    assert figure.get_suptitle() == "both"


def test_metrics_are_never_put_on_one_scale():
    scores = metric_maps(3, 4)
    with pytest.raises(ShapeError, match=re.escape("scores.select(metric='logit difference')")):
        heatmap(scores, panel="layer")
    with pytest.raises(ShapeError, match="too many to look at"):
        Scores(torch.zeros(MAX_PANELS + 1, 2), ("metric", "layer")).plot()
    with pytest.raises(ShapeError, match=re.escape("scores.table()")):
        Scores(torch.zeros(2), ("metric",)).plot()
    with pytest.raises(ShapeError, match=re.escape("scores.select(metric=0)")):
        Scores(torch.zeros(2, 2, 2, 2), ("metric", "layer", "pos", "head")).plot()
    assert heatmap(metric_maps(3)).axes[0].images, "rows, where a heatmap is asked for"


def test_plot_chooses_the_picture():
    assert not plot(Scores(torch.randn(3), ("run",))).axes[0].images
    assert plot(Scores(torch.randn(3, 2), ("run", "pos"))).axes[0].images
    assert len(panels(plot(Scores(torch.randn(2, 2, 3), ("layer", "head", "query_pos"))))) == 2
    with pytest.raises(ShapeError, match="two axes"):
        plot(Scores(torch.zeros(2), ("layer",)), panel="layer")


def test_patterns_have_a_panel_for_each_head():
    scores = Scores(torch.randn(3, 2, 4), ("layer", "head", "query_pos"))
    drawn = panels(scores.plot())
    assert len(drawn) == 2
    assert np.array_equal(image(drawn[1]), scores.values[:, 1].double().numpy())
    assert (drawn[0].get_xlabel(), drawn[0].get_ylabel()) == ("query position", "layer")


def test_long_titles_are_wrapped_within_the_picture():
    scores = Scores(torch.zeros(2, 2), ("layer", "head"), title="many words " * 12)
    figure = scores.plot()
    figure.canvas.draw()
    box = figure._suptitle.get_window_extent()
    assert "\n" in figure.get_suptitle()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("shape", [(12, 64), (12, 1000), (1000, 12)])
def test_long_prompts_fit_a_page(shape):
    figure = heatmap(Scores(torch.randn(shape), ("layer", "pos")))
    assert max(figure.get_size_inches()) < 17


def test_more_entries_than_dots_are_refused():
    """Rather than drawn with some of them lost between the dots."""
    with pytest.raises(ShapeError, match=re.escape(f"neuron=slice(0, {MAX_ENTRIES})")):
        Scores(torch.zeros(2, MAX_ENTRIES + 1), ("layer", "neuron")).plot()


def test_near_baselines_share_a_name():
    figure = heatmap(token_map(baselines={"clean": 0.0, "corrupted": 0.1, "zero": 9.0}))
    assert texts(figure.axes[-1].texts) == ["clean, corrupted", "zero"]


def test_too_much_to_look_at_says_what_to_select():
    many = Scores(torch.zeros(2, 2, MAX_PANELS + 1), ("layer", "pos", "head"))
    with pytest.raises(ShapeError, match=re.escape("scores.select(head=0).plot()")):
        many.plot()
    with pytest.raises(ShapeError, match=re.escape("scores.select(kind=0)")):
        heatmap(Scores(torch.zeros(2, 2, 2, 2), ("kind", "layer", "pos", "head")))
    with pytest.raises(ShapeError, match="none"):
        heatmap(Scores(torch.tensor(1.0), ()))
    with pytest.raises(ShapeError, match="panel='heads'"):
        heatmap(many, panel="heads")
    with pytest.raises(ShapeError, match="two axes"):
        heatmap(Scores(torch.zeros(2), ("layer",)), panel="layer")


def test_any_text_can_be_drawn(tmp_path):
    """Neither mathematics nor missing glyphs (which warn) nor markup come from tokens."""
    tokens = ("$x$:0", "中文:1", "\x00\x85:2", "a_b^c:3", "\\frac:4", "é…:5", "🙂" * 30 + ":6")
    scores = token_map(tokens=tokens, title="$ 中 $", unit="$u$", baselines={"$é$": 3.0})
    figure = heatmap(scores, tmp_path / "map.png")
    labels = texts(panels(figure)[0].get_xticklabels())
    assert labels[:6] == [
        "$x$:0", "\\u4e2d\\u6587:1", "\\x00\\x85:2", "a_b^c:3", "\\frac:4", "é…:5"
    ]  # fmt: skip
    assert labels[6].endswith(":6")
    assert len(labels[6]) <= MAX_LABEL


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (30, 9), (80, 100), (3, 300)])
def test_labels_do_not_overlap(layers, tokens):
    scores = token_map(layers, [f" token{i}:{i}" for i in range(tokens)])
    figure = heatmap(scores)
    figure.canvas.draw()
    ax = panels(figure)[0]
    for labels, side in ((ax.get_xticklabels(), 0), (ax.get_yticklabels(), 1)):
        assert labels
        places = [label.get_transform().transform(label.get_position())[side] for label in labels]
        needed = labels[0].get_fontsize() * figure.dpi / 72
        assert all(b - a >= needed for a, b in itertools.pairwise(places))


def test_written_files(tmp_path):
    scores = token_map()
    for name, start in (("a.png", b"\x89PNG"), ("deep/b.pdf", b"%PDF"), ("c.svg", b"<?xml")):
        heatmap(scores, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "deep", "c.svg"}


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match=re.escape(str(tmp_path / "file" / "a.png"))):
        heatmap(token_map(), tmp_path / "file" / "a.png")
    with pytest.raises(SourceError, match="cannot write the picture"):
        heatmap(token_map(), tmp_path / "a.nonsense")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_your_own_axes():
    figure = matplotlib.figure.Figure()
    left, right = figure.subplots(1, 2)
    assert heatmap(token_map(), ax=left) is figure
    assert left.get_title() == "denoising resid_pre"
    assert not right.images
    with pytest.raises(ShapeError, match="one panel"):
        heatmap(Scores(torch.zeros(2, 2, 2), ("kind", "layer", "head")), ax=left)


def test_notebooks_get_a_picture():
    assert heatmap(token_map())._repr_png_().startswith(b"\x89PNG")


def test_scores_plot_reaches_the_heatmap(tmp_path):
    figure = token_map().plot(tmp_path / "map.png", title="mine")
    assert figure.get_suptitle() == "mine"
    assert (tmp_path / "map.png").exists()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"fastlens-interp\[plot\]"):
        token_map().plot()


def test_global_state_is_left_alone(tmp_path):
    """No pyplot, hence no backend; the rcParams as they were."""
    code = """
import sys, torch
from fastlens.scores import Scores
import fastlens.plotting
assert "matplotlib" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams)
fastlens.plotting.heatmap(Scores(torch.randn(3, 3), ("layer", "pos")), sys.argv[1])
assert dict(matplotlib.rcParams) == before
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "map.png")]
    subprocess.run(command, check=True, env={"MPLCONFIGDIR": str(tmp_path), **os.environ})
    assert (tmp_path / "map.png").exists()
