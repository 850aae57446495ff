"""Copies from a pretended GPU: pinned, on the right stream, and there before they are read."""

import contextlib

import pytest
import torch

from fastlens.hooks import copies
from fastlens.hooks.capture import CaptureSpec, keep
from fastlens.hooks.copies import Copies
from fastlens.slices import Slice


class Stream:
    """A stream that keeps what was asked of it until it is waited for."""

    def __init__(self, name):
        self.name = name
        self.log: list[str] = []

    def wait_stream(self, other):
        self.log.append(f"wait for {other.name}")

    def synchronize(self):
        self.log.append("synchronize")


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda:0")

    def record_stream(self, stream):
        stream.log.append("record")


@pytest.fixture
def gpu(monkeypatch):
    main, side = Stream("main"), Stream("side")
    now = [main]

    @contextlib.contextmanager
    def on(stream):
        before, now[0] = now[0], stream
        yield
        now[0] = before

    class Pinned(torch.Tensor):
        def copy_(self, source, non_blocking=False):
            assert non_blocking
            now[0].log.append("copy")
            return super().copy_(source.as_subclass(torch.Tensor))

    def empty_like(tensor, device, pin_memory):
        assert (device, pin_memory) == ("cpu", True)
        return torch.zeros(tensor.shape, dtype=tensor.dtype).as_subclass(Pinned)

    monkeypatch.setattr(copies.torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(copies.torch.cuda, "stream", on)
    monkeypatch.setattr(copies.torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(copies.torch, "empty_like", empty_like)
    return main, side


def on_gpu(*shape):
    return torch.arange(24.0).reshape(shape).as_subclass(OnGpu)


def test_what_is_owned_goes_beside_the_run(gpu):
    main, side = gpu
    made = Copies()
    kept = made.to(on_gpu(4, 6), "cpu", is_owned=True)
    assert side.log == ["wait for main", "copy", "record"]
    assert main.log == []
    made.finish()
    assert side.log[-1] == "synchronize"
    assert kept.tolist() == torch.arange(24.0).reshape(4, 6).tolist()


def test_what_the_run_goes_on_with_keeps_its_order(gpu):
    main, side = gpu
    made = Copies()
    made.to(on_gpu(4, 6), "cpu", is_owned=False)
    assert main.log == ["copy"]
    assert side.log == []
    made.finish()
    assert main.log == ["copy", "synchronize"]
    made.finish()
    assert main.log == ["copy", "synchronize"]


def test_a_capture_knows_what_it_owns(gpu):
    main, side = gpu
    spec = CaptureSpec(Slice(), "cpu", copies=Copies())
    activation = on_gpu(4, 6)
    keep(activation[1:], spec, activation)
    assert (main.log, side.log) == (["copy"], [])
    keep(activation.clone(), spec, activation)
    assert "copy" in side.log


def test_between_other_devices_it_is_an_ordinary_copy(gpu):
    tensor = torch.ones(3)
    assert Copies().to(tensor, "cpu", is_owned=False) is tensor
    assert Copies().to(tensor, "meta", is_owned=True).is_meta


def test_without_pinned_memory_it_is_an_ordinary_copy(gpu, monkeypatch):
    def refused(*args, **kwargs):
        raise RuntimeError("no pinned memory allocator is available")

    monkeypatch.setattr(copies.torch, "empty_like", refused)
    made = Copies()
    assert made.to(on_gpu(4, 6), "cpu", is_owned=True).tolist()[0][1] == 1
    made.finish()
    assert gpu[0].log == gpu[1].log == []
