"""Indices from axis names and frames, and the hook points they mean."""

import sys

import pytest

from fastlens.errors import HookNameError, MissingDependencyError, PatchIndexError
from fastlens.patching.index_frames import indices_of, make_df_from_ranges, site_of
from fastlens.patching.sites import SITES
from tests.models import ours

pandas = pytest.importorskip("pandas")
N_POS = 5


@pytest.mark.parametrize(
    ("ranges", "names"),
    [
        ((2, 3), ("layer", "pos")),
        ((2, 1, 3), ("layer", "head", "x")),
        ((4,), ["layer"]),
        ((0,), ["a"]),
    ],
)
@pytest.mark.tl
def test_frames_equal_transformer_lens(ranges, names):
    theirs = pytest.importorskip("transformer_lens.patching")
    want = theirs.make_df_from_ranges(ranges, names)
    pandas.testing.assert_frame_equal(make_df_from_ranges(ranges, names), want)


def test_the_last_column_changes_fastest():
    frame = make_df_from_ranges([2, 2], ["layer", "pos"])
    assert list(frame.columns) == ["layer", "pos"]
    assert frame.to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="pip install pandas"):
        make_df_from_ranges([2], ["layer"])
    indices = indices_of(ours("gpt2"), N_POS, "resid_pre", ("layer", "pos"))
    assert len(indices.rows) == 3 * N_POS


@pytest.mark.parametrize(
    ("config", "activation", "axes", "shape"),
    [
        ("gpt2", "resid_pre", ("layer", "pos"), [3, 5]),
        ("gpt2", "z", ("layer", "pos", "head"), [3, 5, 4]),
        ("gpt2", "k", ("layer", "head_index"), [3, 4]),
        ("llama", "z", ("layer", "head"), [3, 4]),
        ("llama", "q", ("layer", "head"), [3, 4]),
        ("llama", "k", ("layer", "head"), [3, 2]),
        ("llama", "v", ("layer", "pos", "head_index"), [3, 5, 2]),
        ("llama", "value", ("layer", "head"), [3, 2]),
        ("llama", "rot_k", ("layer", "head"), [3, 2]),
        ("llama_mqa", "k", ("layer", "head"), [2, 1]),
        ("llama", "pattern", ("layer", "head_index", "dest_pos", "src_pos"), [3, 4, 5, 5]),
        ("gpt2", "post", ("layer",), [3]),
        ("gpt2", "z1", ("pos", "head"), [5, 4]),
    ],
)
def test_ranges_of_axes(config, activation, axes, shape):
    indices = indices_of(ours(config), N_POS, activation, axes)
    assert indices.shape == shape
    assert indices.rows[0] == [0] * len(axes)
    assert indices.rows[-1] == [length - 1 for length in shape]
    assert indices.frame is None


def test_ungrouped_keys():
    model = ours("llama", ungroup_grouped_query_attention=True)
    # TransformerLens counts KV heads for "k" and "v" whatever the flag.
    assert indices_of(model, N_POS, "k", ("layer", "head")).shape == [3, 2]
    assert indices_of(model, N_POS, "rot_k", ("layer", "head")).shape == [3, 4]


def test_hook_names():
    model = ours("gpt2")
    assert indices_of(model, N_POS, "key", ("layer", "pos")).hook_names == {
        layer: f"blocks.{layer}.attn.hook_k" for layer in range(3)
    }
    fixed = indices_of(model, N_POS, "scale2ln1", ("pos",)).hook_names
    assert set(fixed.values()) == {"blocks.2.ln1.hook_scale"}


def test_sites_of_hook_names():
    for site in SITES.values():
        assert site_of(site.hook_name(11)) is site
    for name in ("blocks.0.ln1.hook_scale", "hook_embed", "blocks.{layer}.hook_z", "hook_z"):
        assert site_of(name) is None


def test_rows_of_a_frame():
    model = ours("gpt2")
    frame = pandas.DataFrame({"layer": [2, 0], "anything": [4, 1]})
    indices = indices_of(model, N_POS, "resid_pre", index_df=frame)
    assert indices.rows == [[2, 4], [0, 1]]
    assert all(type(entry) is int for row in indices.rows for entry in row)
    assert indices.shape == [2]
    assert indices.frame is frame


def test_rows_of_an_empty_frame():
    frame = make_df_from_ranges([0, 3], ["layer", "pos"])
    indices = indices_of(ours("gpt2"), N_POS, "resid_pre", index_df=frame)
    assert (indices.rows, indices.shape, indices.hook_names) == ([], [0], {})


def test_a_frame_is_made_on_request():
    indices = indices_of(ours("gpt2"), N_POS, "z", ("layer", "head"), return_index_df=True)
    assert indices.frame.to_numpy().tolist() == indices.rows
    assert list(indices.frame.columns) == ["layer", "head"]


@pytest.mark.parametrize("given", ["neither", "both"])
def test_axes_or_a_frame(given):
    frame = make_df_from_ranges([2, 2], ["layer", "pos"]) if given == "both" else None
    axes = ("layer", "pos") if given == "both" else None
    with pytest.raises(AssertionError, match=f"there are {given}"):
        indices_of(ours("gpt2"), N_POS, "resid_pre", axes, frame)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("layer", "positions"), "'positions'.*Nearest: 'pos'"),
        (("pos", "layer"), "'layer' must be the first"),
        (("pos",), "must start with 'layer'"),
        ((), "must start with 'layer'"),
    ],
)
def test_wrong_axes(axes, message):
    with pytest.raises(PatchIndexError, match=message):
        indices_of(ours("gpt2"), N_POS, "resid_pre", axes)


def test_a_frame_whose_layer_is_not_first():
    frame = make_df_from_ranges([2, 2], ["pos", "layer"])
    with pytest.raises(PatchIndexError, match="index_df has the axes pos, layer"):
        indices_of(ours("gpt2"), N_POS, "resid_pre", index_df=frame)


@pytest.mark.parametrize("layer", [3, -1, 0.5])
def test_a_layer_out_of_range(layer):
    frame = pandas.DataFrame({"layer": [0, layer], "pos": [0, 0]})
    with pytest.raises(PatchIndexError, match=r"layer \S+ of resid_pre is out.*0 to 2"):
        indices_of(ours("gpt2"), N_POS, "resid_pre", index_df=frame)


@pytest.mark.parametrize(
    ("config", "activation", "message"),
    [
        ("gpt2", "resid_per", "no hook point 'blocks.0.hook_resid_per'. Nearest: 'resid_pre'"),
        ("gpt2", "xyzzy", "no hook point 'blocks.0.hook_xyzzy'. It has resid_pre, "),
        ("gpt2", "z7", "no hook point 'blocks.7.attn.hook_z'"),
        ("neox", "resid_mid", "attention and MLP are parallel"),
        ("attn_only", "mlp_out", "attention only"),
        ("attn_only", "mlp_in", "attention only"),
    ],
)
def test_an_activation_the_model_lacks(config, activation, message):
    with pytest.raises(HookNameError, match=message) as caught:
        indices_of(ours(config), N_POS, activation, ("layer", "pos")[activation == "z7" :])
    assert isinstance(caught.value, KeyError)
    assert ".." not in str(caught.value)
