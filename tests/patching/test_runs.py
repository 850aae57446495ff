"""Selections and runs: pure integers."""

import pytest

from fastlens.errors import SweepError
from fastlens.patching.runs import PlannedPatch, chosen, runs_of
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


def shown(runs):
    """Cell, layer and indices of runs of one patch each."""
    return [(run.cell, run.patches[0].layer, run.patches[0].indices()) for run in runs]


def test_a_patch_knows_its_place():
    patch = PlannedPatch("pattern", 2, pos=(3,), columns=(1,), keys=(0, 2))
    assert patch.hook_name == "blocks.2.attn.hook_pattern"
    # In the order of the activation's axes: head, query position, key position.
    assert patch.indices() == ((1,), (3,), (0, 2))
    assert PlannedPatch("z", 0, columns=(1,)).indices() == (None, (1,))
    assert PlannedPatch("mlp_post", 0, (4,), (7,)).indices() == ((4,), (7,))
    assert PlannedPatch("resid_pre", 0, (4,)).indices() == ((4,),)


def test_runs_are_the_product_of_by_in_its_order():
    runs = runs_of(
        SITES["z"],
        ("layer", "head"),
        {"layer": [0, 2], "pos": [0, 1, 2], "head": [0, 3]},
        {},
        n_layers=3,
    )
    assert shown(runs) == [
        ((0, 0), 0, (None, (0,))),
        ((0, 1), 0, (None, (3,))),
        ((1, 0), 2, (None, (0,))),
        ((1, 1), 2, (None, (3,))),
    ]
    assert {run.patches[0][-3:-1] for run in runs} == {(0, "replace")}


def test_another_order_of_axes():
    indices = {"layer": [0, 1], "pos": [4, 5]}
    runs = runs_of(SITES["resid_pre"], ("pos", "layer"), indices, {}, cell_start=(7,), n_layers=2)
    assert shown(runs) == [
        ((7, 0, 0), 0, ((4,),)),
        ((7, 0, 1), 1, ((4,),)),
        ((7, 1, 0), 0, ((5,),)),
        ((7, 1, 1), 1, ((5,),)),
    ]


def test_every_axis_of_a_pattern():
    indices = {"layer": [1], "head": [0, 2], "query_pos": [3], "key_pos": [0, 1]}
    by = ("layer", "head", "query_pos", "key_pos")
    assert shown(runs_of(SITES["pattern"], by, indices, {}, n_layers=2)) == [
        ((0, 0, 0, 0), 1, ((0,), (3,), (0,))),
        ((0, 0, 0, 1), 1, ((0,), (3,), (1,))),
        ((0, 1, 0, 0), 1, ((2,), (3,), (0,))),
        ((0, 1, 0, 1), 1, ((2,), (3,), (1,))),
    ]


def test_a_restriction_outside_by_narrows_the_patch():
    indices = {"layer": [1], "head": [0], "query_pos": [3, 4], "key_pos": [0, 1]}
    restricted = {"layer": [1], "head": [0], "query_pos": [3, 4]}
    (run,) = runs_of(SITES["pattern"], ("layer", "head"), indices, restricted, n_layers=2)
    assert run.patches[0].indices() == ((0,), (3, 4), None)


def test_source_and_mode_are_those_of_every_patch():
    runs = runs_of(SITES["z"], ("layer",), {"layer": [0, 1]}, {}, n_layers=2, value=3, mode="add")
    assert [(p.value, p.mode) for run in runs for p in run.patches] == [(3, "add")] * 2


@pytest.mark.parametrize(
    ("window", "layers"),
    [
        (1, [[0], [1], [2], [3]]),
        (2, [[0], [0, 1], [1, 2], [2, 3]]),
        (3, [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]),
        (4, [[0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3]]),
        (100, [[0, 1, 2, 3]] * 4),
    ],
)
def test_windows_are_centred_and_cut_off_at_the_ends(window, layers):
    runs = runs_of(SITES["mlp_out"], ("layer",), {"layer": range(4)}, {}, window=window, n_layers=4)
    assert [[patch.layer for patch in run.patches] for run in runs] == layers


def test_a_window_may_reach_beyond_the_layers_that_are_swept():
    (run,) = runs_of(SITES["mlp_out"], ("layer",), {"layer": [2]}, {}, window=3, n_layers=6)
    assert [patch.layer for patch in run.patches] == [1, 2, 3]
