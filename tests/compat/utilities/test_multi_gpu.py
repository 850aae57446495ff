"""Choosing among devices, against TransformerLens; the devices are made up."""

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn as nn

from fastlens.compat.utilities import multi_gpu as ours

COMPARED = [
    "transformer_lens.utilities.multi_gpu.AvailableDeviceMemory",
    "transformer_lens.utilities.multi_gpu.MaxMemory",
    "transformer_lens.utilities.multi_gpu.calculate_available_device_cuda_memory",
    "transformer_lens.utilities.multi_gpu.count_unique_devices",
    "transformer_lens.utilities.multi_gpu.determine_available_memory_for_available_devices",
    "transformer_lens.utilities.multi_gpu.find_embedding_device",
    "transformer_lens.utilities.multi_gpu.get_best_available_cuda_device",
    "transformer_lens.utilities.multi_gpu.get_best_available_device",
    "transformer_lens.utilities.multi_gpu.get_device_for_block_index",
    "transformer_lens.utilities.multi_gpu.is_mixed_cpu_gpu",
    "transformer_lens.utilities.multi_gpu.resolve_device_map",
    "transformer_lens.utilities.multi_gpu.sort_devices_based_on_available_memory",
]

pytestmark = pytest.mark.tl


@pytest.fixture(scope="module")
def tl(theirs) -> Any:
    return theirs("multi_gpu")


@pytest.fixture
def three_gpus(monkeypatch):
    """Three CUDA devices of 10 bytes, of which 4, 1 and 7 are taken."""
    taken = [4, 1, 7]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=10)
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: taken[i])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10 - taken[i], 10))


def test_memory(tl, three_gpus):
    assert ours.calculate_available_device_cuda_memory(2) == 3
    assert tl.calculate_available_device_cuda_memory(2) == 3
    found = ours.determine_available_memory_for_available_devices(3)
    assert found == tl.determine_available_memory_for_available_devices(3)
    before = list(found)
    ordered = ours.sort_devices_based_on_available_memory(found)
    assert ordered == tl.sort_devices_based_on_available_memory(found) == [(1, 9), (0, 6), (2, 3)]
    assert found == before
    assert ours.AvailableDeviceMemory == tl.AvailableDeviceMemory
    assert get_args(ours.MaxMemory) == get_args(tl.MaxMemory)


def test_the_best_device(tl, three_gpus):
    for n_devices in (None, 1, 2):
        found = ours.get_best_available_cuda_device(n_devices)
        assert found == tl.get_best_available_cuda_device(n_devices)
    for device, n_devices in (("cpu", 2), ("cuda", 1), ("cuda:2", 1), ("cuda", 3)):
        cfg = SimpleNamespace(device=device, n_devices=n_devices)
        assert ours.get_best_available_device(cfg) == tl.get_best_available_device(cfg)


def test_there_is_none(tl, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for library in (ours, tl):
        with pytest.raises(OSError):
            library.get_best_available_cuda_device()


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "mps", torch.device("cuda", 2)])
@pytest.mark.parametrize(("n_layers", "n_devices"), [(12, 1), (12, 4), (62, 8), (3, 4)])
def test_blocks_over_devices(tl, device, n_layers, n_devices):
    cfg = SimpleNamespace(device=device, n_layers=n_layers, n_devices=n_devices)
    for index in range(n_layers):
        found = ours.get_device_for_block_index(index, cfg)
        assert found == tl.get_device_for_block_index(index, cfg)
        found = ours.get_device_for_block_index(index, cfg, "cuda:1")
        assert found == tl.get_device_for_block_index(index, cfg, device="cuda:1")


@pytest.mark.parametrize(
    "arguments",
    [
        (None, None, None),
        (1, None, "cpu", {0: "1GiB"}),
        (2, None, None),
        (2, None, "cuda", {0: 5, 1: 6}),
        (None, "auto", None),
        (None, {"a": 0, "b": "cuda:1"}, None, {0: 5}),
        (3, {"a": "cpu", "b": "meta"}, None),
    ],
    ids=repr,
)
def test_device_maps(tl, three_gpus, arguments):
    assert ours.resolve_device_map(*arguments) == tl.resolve_device_map(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "auto", "cpu"), "give one of them"),
        ((4, None, None), "n_devices=4, but 3 CUDA devices exist"),
        ((None, {"a": "disk"}, None), "'a'.*weights on disk"),
        ((None, {"a": "cpu", "b": 0}, None), "some on GPUs"),
    ],
)
def test_device_maps_that_are_refused(tl, three_gpus, arguments, message):
    with pytest.raises(ValueError, match=message):
        ours.resolve_device_map(*arguments)
    with pytest.raises(ValueError):
        tl.resolve_device_map(*arguments)


@pytest.mark.parametrize(
    "places", [[], ["cpu"], [0, 1], ["cpu", 1], ["CPU", "cuda:1"], ["cuda", "meta"], ["disk", 0]]
)
def test_mixed_places(tl, places):
    assert ours.is_mixed_cpu_gpu(places) == tl.is_mixed_cpu_gpu(places)


class Spread:
    """As much of a Hugging Face model as is read."""

    def __init__(self, embedding: Any, **placed: Any):
        self.hf_device_map, self.embedding = placed, embedding

    def get_input_embeddings(self) -> Any:
        if self.embedding is NotImplementedError:
            raise NotImplementedError
        return self.embedding


@pytest.mark.parametrize(
    "model",
    [
        object(),
        Spread(nn.Embedding(2, 2)),
        Spread(nn.Embedding(2, 2, device="meta"), a=0, b="cpu"),
        Spread(nn.Identity(), a=1, b=0),
        Spread(None, a="cuda:1", b="cpu", c="cpu"),
        Spread(NotImplementedError, a="cpu"),
    ],
)
def test_models_that_are_spread(tl, model):
    assert ours.find_embedding_device(model) == tl.find_embedding_device(model)
    assert ours.count_unique_devices(model) == tl.count_unique_devices(model)


def test_two_spellings_are_one_device():
    """TransformerLens counts 0 and "cuda:0" as two."""
    assert ours.count_unique_devices(Spread(None, a=0, b="cuda:0")) == 1
