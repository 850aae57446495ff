"""What pictures share: text that fits and can be drawn, scales, names, files."""

import numpy as np
import pytest

from fastlens.errors import SourceError
from fastlens.figures import (
    axis_title,
    drawable,
    label_side,
    named_together,
    new_figure,
    number_text,
    reach,
    shortened,
    write_figure,
)

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("number", "span", "text"),
    [
        (1.2345, 3.0, "1.23"),
        (-0.001, 3.0, "0.00"),
        (123.4, 150.0, "123"),
        (0.01234, 0.05, "0.012"),
        (0.001234, 0.005, "0.0012"),
        (1.2e-5, 2e-5, "1.2e-05"),
        (-0.0, 1e-5, "0.0e+00"),
        (1.5e6, 1.5e6, "1.5e+06"),
        (float("nan"), 1.0, "nan"),
        (float("-inf"), 1.0, "-inf"),
    ],
)
def test_numbers_have_the_decimals_their_scale_needs(number, span, text):
    assert number_text(number, span) == text


def test_axis_titles():
    assert [axis_title(name) for name in ("query_pos", "layer", "my_axis")] == [
        "query position",
        "layer",
        "my axis",
    ]


def test_reach():
    numbers = np.array([1.0, 3.0, np.nan, np.inf])
    assert reach(numbers, 2.0, {}) == (1.0, 1.0, 3.0)
    # A baseline just beyond the numbers counts, one far beyond does not.
    assert reach(numbers, 2.0, {"near": 3.2, "far": 9.0}) == (pytest.approx(1.2), 1.0, 3.2)
    # The reference is always seen; equal numbers have a scale all the same.
    assert reach(np.array([5.0]), 2.0, {}) == (3.0, 2.0, 5.0)
    assert reach(np.array([2.0]), 2.0, {}) == (1.0, 2.0, 3.0)
    assert reach(np.array([np.nan]), 0.0, {}) == (1.0, 0.0, 1.0)


def test_near_baselines_share_a_place():
    baselines = {"clean": 0.0, "corrupted": 0.03, "zero": 2.0, "outside": 9.0}
    assert named_together(baselines, 0.0, 2.0, 0.1) == [("clean, corrupted", 0.015), ("zero", 2.0)]
    assert len(named_together(baselines, 0.0, 2.0, 0.01)) == 3
    assert named_together({}, 0.0, 1.0, 0.1) == []


def test_shortened_keeps_both_ends():
    assert shortened("short") == "short"
    assert shortened("a" * 30 + ":17") == "aaaaaaaaaa…aaaaaaa:17"
    assert len(shortened("b" * 100, 44)) <= 44


def test_drawable():
    assert drawable("aé中\x00") == "aé\\u4e2d\\x00"


def test_labels_are_turned_only_where_they_must():
    def rotation(labels, cell, **options):
        axis = new_figure(4.0, 4.0).subplots().xaxis
        label_side(axis, "pos", labels, cell, **options)
        return axis.get_ticklabels()[0].get_rotation(), len(axis.get_ticklabels())

    assert rotation(["H1"] * 4, 0.5) == (0, 4)
    assert rotation(["a longer label"] * 4, 0.5) == (50, 4)
    assert rotation(["a longer label"] * 4, 0.5, steep=True) == (90, 4)
    assert rotation(["a longer label"] * 4, 0.5, upright=True) == (0, 4)
    assert rotation(["a longer label"] * 4, 0.2) == (90, 4)
    # Every second one, where there is no room for all.
    assert rotation(["a longer label"] * 4, 0.1) == (90, 2)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    class Torn:
        def savefig(self, path, **options):
            path.write_bytes(b"half")
            raise OSError("disk full")

    write_figure(new_figure(2.0, 1.0), tmp_path / "good.png", 50)
    before = (tmp_path / "good.png").read_bytes()
    with pytest.raises(SourceError, match="disk full"):
        write_figure(Torn(), tmp_path / "good.png", 50)
    assert (tmp_path / "good.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["good.png"]
