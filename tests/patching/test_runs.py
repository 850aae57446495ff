"""Selections and runs: pure integers."""

import pytest

from fastlens.errors import SweepError
from fastlens.patching.runs import chosen, runs_of
from fastlens.patching.sites import SITES


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        (2, [2]),
        (-1, [4]),
        ([3, -5], [3, 0]),
        (range(1, 3), [1, 2]),
        (slice(-2, None), [3, 4]),
        (slice(None, None, 2), [0, 2, 4]),
    ],
)
def test_selections(selection, expected):
    assert chosen(selection, 5, "layers") == expected


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (5, "layers 5 is out of range: there are 5"),
        ([0, -6], "layers -6 is out of range"),
        ([1, -4], "names an index twice"),
        ([], "is empty"),
        (slice(5, 9), "is empty"),
    ],
)
def test_selections_that_make_no_sense(selection, message):
    with pytest.raises(SweepError, match=message):
        chosen(selection, 5, "layers")


def test_runs_are_the_product_of_by_in_its_order():
    runs = runs_of(
        SITES["z"], ("layer", "head"), {"layer": [0, 2], "pos": [0, 1, 2], "head": [0, 3]}, {}
    )
    assert [(run.cell, run.layer, run.index) for run in runs] == [
        ((0, 0), 0, (None, 0)),
        ((0, 1), 0, (None, 3)),
        ((1, 0), 2, (None, 0)),
        ((1, 1), 2, (None, 3)),
    ]
    assert runs[2].hook_name == "blocks.2.attn.hook_z"


def test_another_order_of_axes():
    indices = {"layer": [0, 1], "pos": [4, 5]}
    runs = runs_of(SITES["resid_pre"], ("pos", "layer"), indices, {}, cell_start=(7,))
    assert [(run.cell, run.layer, run.index) for run in runs] == [
        ((7, 0, 0), 0, (4,)),
        ((7, 0, 1), 1, (4,)),
        ((7, 1, 0), 0, (5,)),
        ((7, 1, 1), 1, (5,)),
    ]


def test_a_restriction_outside_by_narrows_the_patch():
    indices = {"layer": [1], "head": [0], "query_pos": [3, 4], "key_pos": [0, 1]}
    restricted = {"layer": [1], "head": [0], "query_pos": [3, 4]}
    (run,) = runs_of(SITES["pattern"], ("layer", "head"), indices, restricted)
    assert run.index == (0, (3, 4), None)
