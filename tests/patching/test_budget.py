"""What a sweep may take."""

import pytest
import torch

from fastlens.errors import ConfigError, StreamError
from fastlens.patching import budget
from fastlens.patching.budget import (
    HOLES_BYTES,
    StreamedWeights,
    allowed_bytes,
    means_of,
    reserved,
    streaming_of,
)
from fastlens.patching.strategy import ALONE, WAVE, Strategy
from fastlens.patching.traffic import ON_DISK, ON_HOST, Means, Passes
from tests.models import ours
from tests.patching.budgets import streamed

GB = 2**30


def test_half_of_what_is_free_or_what_was_asked(monkeypatch):
    monkeypatch.setattr(budget, "free_bytes", lambda device: 6 * GB)
    model = ours("gpt2")
    assert streaming_of(model) is None
    assert allowed_bytes(model, None) == 3 * GB
    assert allowed_bytes(model, "1GiB") == GB and allowed_bytes(model, 77) == 77
    with pytest.raises(ConfigError, match="is no amount"):
        allowed_bytes(model, "much")


def test_a_streamed_models_limit_holds_in_any_case(monkeypatch):
    model = streamed(ours("gpt2"), room=16 * GB)
    assert isinstance(streaming_of(model), StreamedWeights)
    assert allowed_bytes(model, None) == 15 * GB == allowed_bytes(model, 20 * GB)
    assert allowed_bytes(model, GB) == GB

    def no_limit():
        raise StreamError("there is no max_memory")

    model.streaming.room = no_limit
    monkeypatch.setattr(budget, "free_bytes", lambda device: 6 * GB)
    assert allowed_bytes(model, None) == 3 * GB


def test_where_rows_may_wait(monkeypatch, tmp_path):
    model = ours("gpt2", n_layers=3)
    assert means_of(model) == Means()
    streamed(model, block_bytes=50)
    monkeypatch.setattr(budget, "free_on_disk", lambda folder: 1000 if folder == tmp_path else 0)
    assert means_of(model, tmp_path) == Means((50, 50, 50), ON_DISK, 800)
    monkeypatch.setattr(budget, "free_bytes", lambda device: {"cpu": 500}[str(device)])
    model.cfg.device = "cuda"
    assert means_of(model) == Means((50, 50, 50), ON_HOST, 250)


@pytest.mark.parametrize(("held", "memory"), [(100, 1000), (100, GB), (1000, 1000), (GB, GB // 2)])
def test_what_is_reserved(held, memory):
    model = streamed(ours("gpt2"))
    passes = Passes(((0,),), "", held)
    with reserved(model, Strategy(WAVE), passes, memory):
        assert model.streaming.inside == 1
    assert model.streaming.inside == 0
    expected = max(held, min(memory, held + held // 2 + HOLES_BYTES))
    assert model.streaming.reserved == [expected]


def test_hooked_forwards_and_models_in_memory_reserve_nothing():
    model = streamed(ours("gpt2"))
    with reserved(model, Strategy(ALONE, "hooks"), Passes(()), 1000):
        assert model.streaming.reserved == []
    with reserved(torch.nn.Identity(), Strategy(WAVE), Passes(()), 1000):
        pass
