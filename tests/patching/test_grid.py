"""The runs, axes and labels that a sweep's arguments stand for."""

import math

import pytest
import torch

from fastlens.errors import SweepError
from fastlens.patching.grid import given_runs, grid_of
from fastlens.patching.patch import Patch, Sources
from fastlens.patching.prompts import Prompts, prompts_of
from tests.models import ours, prompts
from tests.patching.texts import text_model

NOTHING = {"layer": None, "pos": None, "head": None, "neuron": None, "key_pos": None}


def grid(name="gpt2", sites="resid_pre", by=None, sources=None, options=None, **restrictions):
    tokens = prompts(2, 5)
    sources = sources or Sources(2, 5, seed=0)
    restrictions = {**NOTHING, **restrictions}
    pair = Prompts(tokens, tokens)
    return grid_of(ours(name), pair, sites, by, restrictions, sources, **(options or {}))


def shown(found):
    """Layer and indices of each run of one patch."""
    return [(run.patches[0].layer, run.patches[0].indices()) for run in found.runs]


@pytest.mark.parametrize(
    ("sites", "by", "axes", "shape"),
    [
        ("resid_pre", None, ("layer", "pos"), (3, 5)),
        ("z", None, ("layer", "head"), (3, 4)),
        ("z", ("layer", "pos", "head"), ("layer", "pos", "head"), (3, 5, 4)),
        ("k", None, ("layer", "head"), (3, 2)),
        ("pattern", None, ("layer", "head"), (3, 4)),
        (
            "pattern",
            ("layer", "head", "query_pos", "key_pos"),
            ("layer", "head", "query_pos", "key_pos"),
            (3, 4, 5, 5),
        ),
        ("mlp_post", ("layer", "neuron"), ("layer", "neuron"), (3, 48)),
        ("attn_out", ("pos", "layer"), ("pos", "layer"), (5, 3)),
        (["q", "z"], None, ("site", "layer", "head"), (2, 3, 4)),
        (["resid_pre"], None, ("site", "layer", "pos"), (1, 3, 5)),
    ],
)
def test_axes_and_shapes(sites, by, axes, shape):
    found = grid("llama", sites, by)
    assert (found.axes, found.shape) == (axes, shape)
    assert len(found.runs) == math.prod(shape)
    # Scores are the values of the runs, reshaped.
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    for number, run in enumerate(found.runs):
        assert sum(i * s for i, s in zip(run.cell, strides, strict=True)) == number


def test_restrictions_shorten_axes_and_keep_labels():
    found = grid("llama", "z", layer=[2, 0], head=slice(1, 3))
    assert found.labels == {"layer": ["L2", "L0"], "head": ["H1", "H2"]}
    assert shown(found) == [
        (2, (None, (1,))),
        (2, (None, (2,))),
        (0, (None, (1,))),
        (0, (None, (2,))),
    ]


def test_restrictions_outside_by_narrow_the_patch():
    assert shown(grid("llama", "z", ("layer",), pos=[-1], head=1, layer=0)) == [(0, ((4,), (1,)))]
    found = grid("llama", "pattern", pos=-1, layer=0, head=0)
    assert shown(found) == [(0, ((0,), (4,), None))]
    found = grid("llama", "pattern", pos=-1, layer=0, head=0, key_pos=[0, 2])
    assert shown(found) == [(0, ((0,), (4,), (0, 2)))]
    found = grid("gpt2", "mlp_post", pos=1, layer=0, neuron=[3, -1])
    assert shown(found) == [(0, ((1,), (3, 127)))]


def test_labels():
    assert grid("llama", "k").labels["head"] == ["KV0", "KV1"]
    assert grid("gpt2", "k").labels["head"] == ["H0", "H1", "H2", "H3"]
    assert grid("gpt2", "mlp_post", ("layer", "neuron"), neuron=7).labels["neuron"] == ["N7"]
    assert grid("gpt2", ["q", "z"]).labels["site"] == ["q", "z"]
    model = text_model()
    pair = prompts_of(model, "the cat", "the the")
    restrictions = {**NOTHING, "pos": slice(1, None)}
    found = grid_of(model, pair, "resid_pre", None, restrictions, Sources(1, 3, seed=0))
    assert found.labels["pos"] == ["the:1", " cat/ the:2"]


def test_names_of_runs():
    assert grid("gpt2", "z").name(grid("gpt2", "z").runs[5]) == "z, layer L1, head H1"
    found = grid("gpt2", ["attn_out", "mlp_out"])
    assert found.name(found.runs[-1]) == "mlp_out, layer L2, pos 4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": []}, "empty"),
        ({"sites": ["z", "z"]}, "names a site twice"),
        ({"sites": ["mlp_post", "post"]}, "names a site twice"),
        ({"sites": ["resid_pre", "z"]}, "swept by different axes"),
        ({"sites": ["q", "k"], "name": "llama"}, "q and k have different heads"),
        ({"sites": "resid_pre", "head": 0}, "heads= was given, but resid_pre"),
        ({"sites": "z", "neuron": 0}, "neurons= was given, but z"),
        ({"sites": "z", "head": 4}, "heads 4 is out of range: there are 4"),
        ({"sites": "k", "name": "llama", "head": 2}, "heads 2 is out of range: there are 2"),
        ({"pos": 5}, "positions 5 is out of range: there are 5"),
        ({"layer": 3}, "layers 3 is out of range: there are 3"),
        ({"by": ("layer", "head")}, "cannot be swept by 'head'"),
        ({"sites": "resid_mid", "name": "neox"}, "no resid_mid"),
        ({"sites": "z", "key_pos": 0}, "key_positions= was given, but z"),
        ({"sites": "pattern", "key_pos": 5}, "key_positions 5 is out of range"),
        ({"options": {"window": 0}}, "window=0 must be at least 1 layer"),
        ({"options": {"mode": "replac"}}, "mode='replac' is none of.*Nearest: 'replace'"),
        ({"options": {"source": "means"}}, "source='means' is none of.*Nearest: 'mean'"),
        ({"options": {"source": {}}}, "the cache holds no blocks.0.hook_resid_pre"),
        ({"options": {"source": torch.zeros(7)}}, r"tensor \[7\] does not broadcast over"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(SweepError, match=message):
        grid(**arguments)


def test_sites_with_equal_heads_share_an_axis():
    assert grid("llama", ["k", "v"]).labels["head"] == ["KV0", "KV1"]
    assert grid("gpt2", ["q", "k", "v", "z"]).shape == (4, 3, 4)


def test_source_mode_and_window_reach_the_patches():
    sources = Sources(2, 5, seed=0)
    found = grid(sites="z", sources=sources, options={"source": "zero", "mode": "add"})
    assert {(p.value, p.mode) for run in found.runs for p in run.patches} == {(1, "add")}
    assert [source.name for source in sources.list] == ["the other prompt", "zero"]
    found = grid(sites=["attn_out", "mlp_out"], options={"window": 2})
    assert found.shape == (2, 3, 5)
    assert [p.layer for p in found.runs[5].patches] == [0, 1]
    assert {p.site for p in found.runs[-1].patches} == {"mlp_out"}


def test_a_cache_must_hold_every_layer_of_a_window():
    cache = {f"blocks.{layer}.hook_mlp_out": torch.zeros(2, 5, 32) for layer in (1, 2)}
    assert grid(sites="mlp_out", layer=2, options={"window": 2, "source": cache}).shape == (1, 5)
    with pytest.raises(SweepError, match=r"the cache holds no blocks\.0\.hook_mlp_out"):
        grid(sites="mlp_out", layer=1, options={"window": 2, "source": cache})
    assert grid(sites="mlp_out", layer=1, options={"source": cache}).shape == (1, 5)
    del cache["blocks.2.hook_mlp_out"]
    with pytest.raises(SweepError, match=r"the cache holds no blocks\.2\.hook_mlp_out"):
        grid(sites="mlp_out", layer=2, options={"window": 2, "source": cache})


def test_runs_given_one_by_one():
    runs = {"both": [Patch("z", 1, head=2), Patch("mlp_out", -1)], "one": Patch("z", 0)}
    found = given_runs(ours("gpt2"), runs, Sources(1, 5, seed=0))
    assert (found.axes, found.shape, found.named) == (("run",), (2,), ["z", "mlp_out"])
    assert found.labels == {"run": ["both", "one"]}
    assert [found.name(run) for run in found.runs] == ["run both", "run one"]
    assert [len(run.patches) for run in found.runs] == [2, 1]
    assert found.runs[0].patches[1].layer == 2
    unnamed = given_runs(ours("gpt2"), [Patch("z", 0), Patch("z", 1)], Sources(1, 5, seed=0))
    assert unnamed.labels == {"run": ["0", "1"]}
