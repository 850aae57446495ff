"""Caches on disk: `run_with_cache(store=)` and `ActivationCache.open`."""

import os
from pathlib import Path

import pytest
import torch

from fastlens import ActivationCache, HookedTransformer
from fastlens.errors import ConfigError, ShapeError, SourceError
from fastlens.hooks.derived import CacheDict
from fastlens.store import Store
from fastlens.store.entries import Stored, StoredDict, fresh, open_entries
from tests.toy import ours_toy

TEXT = "a b c a b c"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return ours_toy()


def test_a_run_into_a_store_has_the_same_activations(model: HookedTransformer, tmp_path: Path):
    logits, expected = model.run_with_cache(TEXT, lazy=False)
    there, cache = model.run_with_cache(TEXT, store=tmp_path)
    opened = ActivationCache.open(tmp_path, model)
    assert torch.equal(logits, there)
    assert list(cache) == list(opened) == list(expected)
    for name in expected:
        assert torch.equal(cache[name], expected[name]) and torch.equal(opened[name], cache[name])
    assert cache.nbytes == opened.nbytes == 0
    assert Store.open(tmp_path).verify() == []


def test_methods_work_on_an_opened_cache(model: HookedTransformer, tmp_path: Path):
    _, expected = model.run_with_cache(TEXT)
    model.run_with_cache(TEXT, store=tmp_path)
    opened = ActivationCache.open(tmp_path, model)
    assert torch.equal(opened.decompose_resid(), expected.decompose_resid())
    stack = expected.accumulated_resid()
    there, here = opened.apply_ln_to_stack(stack), expected.apply_ln_to_stack(stack)
    assert torch.equal(there, here)
    first = opened.apply_slice_to_batch_dim(0)
    assert torch.equal(first["resid_post", 1], expected["resid_post", 1][0])
    rows = opened.pattern_rows(1, [2], [0, 3])
    assert torch.equal(rows, expected["pattern", 1][:, [2]][:, :, [0, 3]])
    names = list(opened)
    assert all(torch.equal(opened.to("cpu")[name], expected[name]) for name in names)
    assert "activations" in repr(opened)


def test_reading_needs_no_model(model: HookedTransformer, tmp_path: Path):
    model.run_with_cache(TEXT, store=tmp_path, remove_batch_dim=True)
    opened = ActivationCache.open(tmp_path)
    assert opened.model is None and not opened.has_batch_dim
    assert opened["resid_post", 0].ndim == 2


def test_packed_and_cast_entries(model: HookedTransformer, tmp_path: Path):
    names = "blocks.1.hook_resid_post"
    for dtype in ("bf16", "int8"):
        _, expected = model.run_with_cache(TEXT, names_filter=names, dtype=dtype)
        model.run_with_cache(TEXT, names_filter=names, dtype=dtype, store=tmp_path / dtype)
        opened = ActivationCache.open(tmp_path / dtype)
        assert opened[names].dtype == expected[names].dtype
        assert torch.equal(opened[names], expected[names])
        assert torch.equal(opened.apply_slice_to_batch_dim([0])[names], expected[names])


def test_a_second_run_is_not_mixed_in(model: HookedTransformer, tmp_path: Path):
    model.run_with_cache(TEXT, store=tmp_path)
    with pytest.raises(ShapeError, match="activations already"):
        model.run_with_cache(TEXT, store=tmp_path)
    with pytest.raises(ConfigError, match="store= and into="):
        model.run_with_cache(TEXT, store=tmp_path / "b", into=CacheDict())


def test_a_torn_entry_is_named_and_the_others_are_read(model: HookedTransformer, tmp_path: Path):
    model.run_with_cache(TEXT, store=tmp_path)
    store = Store.open(tmp_path)
    (number,) = store.where("blocks.1.hook_resid_post")
    os.truncate(store.shards[number].path, 10)
    opened = ActivationCache.open(tmp_path)
    assert "blocks.1.hook_resid_post" in opened
    with pytest.raises(SourceError, match=r"\(blocks\.1\.hook_resid_post\) is torn"):
        opened["blocks.1.hook_resid_post"]
    assert opened["blocks.0.hook_resid_post"].shape[0] == 1


def test_a_failed_run_lets_the_folder_go(model: HookedTransformer, tmp_path: Path):
    with pytest.raises(Exception, match="prepend"):
        model.run_with_cache(TEXT, store=tmp_path, prepend=True)
    Store.create(tmp_path, Store.open(tmp_path).key).close()


def test_datasets_need_the_number_of_a_shard(tmp_path: Path):
    with Store.create(tmp_path) as store:
        for i in range(2):
            store.append({"x": torch.full((2,), i)})
    with pytest.raises(ShapeError, match="it is a dataset"):
        open_entries(tmp_path)
    with pytest.raises(ShapeError, match="shard 2 of 2"):
        open_entries(tmp_path, 2)
    entries, _ = open_entries(tmp_path, 1)
    assert entries["x"].tolist() == [1, 1] == StoredDict.of_shard(store, 1).copy()["x"].tolist()
    assert ActivationCache.open(tmp_path, shard=1)["x"].tolist() == [1, 1]


def test_edits_stay_in_the_process(tmp_path: Path):
    with Store.create(tmp_path) as store:
        store.append({"x": torch.zeros(2)})
    entry = Stored(store, 0, "x")
    entry.read().add_(1)
    assert entry.compute().tolist() == [1, 1] and store.read("x").tolist() == [0, 0]
    assert entry.read_part(None, None) is None and not list(entry.held())


def test_a_place_passed_twice_is_refused(tmp_path: Path):
    entries = fresh(tmp_path, {})
    entries.capture("x", torch.zeros(2))
    with pytest.raises(ShapeError, match="passed twice"):
        entries.capture("x", torch.zeros(2))
    entries.store.close()
