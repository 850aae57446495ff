"""Shuffled batches of stored activations."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlens.errors import ShapeError, SourceError
from fastlens.ops.outlier_rows import capture_int8_outliers
from fastlens.store import ActivationLoader, Store

NAME = "blocks.0.hook_resid_post"
SIZES = [(5, 100), (3, 60), (1, 7)]
TOTAL = 687


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Row i is [i, i + 0.5]; every seventh token is 1."""
    at = 0
    with Store.create(tmp_path / "store") as store:
        for rows, pos in SIZES:
            numbers = torch.arange(at, at + rows * pos).view(rows, pos)
            at += rows * pos
            activations = torch.stack([numbers.float(), numbers + 0.5], dim=-1)
            tokens = (numbers % 7 == 0).int()
            store.append({NAME: activations, "tokens": tokens})
    return store


def seen(batches: Any) -> list[int]:
    return [int(row) for batch in batches for row in batch[:, 0]]


def loader(store: Store, **more: Any) -> ActivationLoader:
    return ActivationLoader(store, NAME, 32, **{"buffer": 100, "epochs": 1, **more})


def test_an_epoch_has_every_row_once_in_another_order(store: Store):
    found = seen(loader(store, drop_last=False))
    assert sorted(found) == list(range(TOTAL)) and found != sorted(found)
    assert len(loader(store, drop_last=False)) == 22


def test_dropping_the_last(store: Store):
    batches = list(loader(store))
    assert len(batches) == len(loader(store)) == 21
    assert all(batch.shape == (32, 2) for batch in batches)
    assert len(set(seen(batches))) == 21 * 32


def test_rows_stay_whole(store: Store):
    for batch in loader(store):
        assert torch.equal(batch[:, 1], batch[:, 0] + 0.5)


def test_seeds_and_epochs_give_other_orders(store: Store):
    first, again = seen(loader(store, seed=3)), seen(loader(store, seed=3))
    assert first == again != seen(loader(store, seed=4))
    two = seen(loader(store, seed=3, epochs=2))
    assert two[: len(first)] == first and two[len(first) :] != first


def test_without_epochs_it_never_ends(store: Store):
    assert len(list(islice(loader(store, epochs=None), 100))) == 100


@pytest.mark.parametrize("after", [0, 1, 3, 4, 20, 21, 30])
def test_a_position_is_taken_up_again(store: Store, after: int):
    whole = loader(store, epochs=2)
    list(islice(whole, after))
    state = whole.state_dict()
    other = loader(store, epochs=2)
    other.load_state_dict(state)
    assert seen(other) == seen(whole)


def test_a_position_of_another_order_is_refused(store: Store):
    with pytest.raises(ShapeError, match="seed=0; this one has 1"):
        loader(store, seed=1).load_state_dict(loader(store).state_dict())


def test_tokens_can_be_left_out(store: Store):
    batches = loader(store, exclude_tokens=[1], drop_last=False)
    assert sorted(seen(batches)) == [i for i in range(TOTAL) if i % 7]


def test_the_buffer_is_bounded(store: Store):
    batches = loader(store)
    for _ in batches:
        assert batches._held is not None and len(batches._held[1]) <= 128


def test_batches_are_the_callers_own(store: Store):
    batches = loader(store, dtype=torch.float32)
    next(batches).zero_()
    assert len(set(seen([next(batches)]))) > 0
    assert next(loader(store, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_packed_entries(tmp_path: Path):
    rows = torch.randn(2, 50, 512, generator=torch.Generator().manual_seed(0))
    with Store.create(tmp_path) as store:
        store.append({NAME: capture_int8_outliers(rows), "tokens": torch.zeros(2, 50).int()})
    expected = capture_int8_outliers(rows).read().flatten(0, 1)
    found = torch.cat(list(ActivationLoader(store, NAME, 10, epochs=1)))
    assert torch.equal(found.sort(dim=0).values, expected.sort(dim=0).values)


def test_what_cannot_be_loaded(store: Store, tmp_path: Path):
    with pytest.raises(ShapeError, match="make no batch"):
        ActivationLoader(store, NAME, 1000)
    with pytest.raises(ShapeError, match="at least one"):
        ActivationLoader(store, NAME, 0)
    with pytest.raises(SourceError, match="Nearest"):
        ActivationLoader(store, "blocks.0.hook_resid_pos", 8)
    with Store.create(tmp_path / "b") as patterns:
        patterns.append({"p": torch.zeros(1, 2, 5, 5), "flat": torch.zeros(3)})
        patterns.append({"p": torch.zeros(1, 2, 6, 6)})
    for name, match in (("p", "differ in width"), ("flat", "no .row, pos, d.")):
        with pytest.raises(ShapeError, match=match):
            ActivationLoader(patterns, name, 1)


def test_saelens_trains_on_it(store: Store):
    sae_lens = pytest.importorskip("sae_lens.training.activation_scaler")
    scaler = sae_lens.ActivationScaler()
    scaler.estimate_scaling_factor(2, iter(loader(store, epochs=None)), 5)
    assert scaler.scaling_factor is not None and scaler.scaling_factor > 0
