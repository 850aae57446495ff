"""The device under test: CUDA for ``pytest -m gpu``, and the CPU for a sample in every run.

pytest -m gpu tests/on_gpu                                  on the current GPU
FASTLENS_TEST_DEVICE=cuda:1 pytest -m gpu tests/on_gpu      on another, not the current one
FASTLENS_TEST_DEVICE=cpu pytest -m gpu tests/on_gpu         the whole cross on the CPU
"""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlens.ops import dispatch

HERE = Path(__file__).parent
GIVEN = os.environ.get("FASTLENS_TEST_DEVICE", "cuda")
# Of each test function, so many of its cases run on the CPU in every run; the others are ``full``.
SAMPLED = 3


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Thin out what the CPU does: it is there to show that the bodies run."""
    by_function: dict[tuple[str, str], list[pytest.Function]] = {}
    for item in items:
        if not isinstance(item, pytest.Function) or HERE not in item.path.parents:
            continue
        if hasattr(item, "callspec") and item.callspec.params.get("device") == "cpu":
            by_function.setdefault((str(item.path), item.originalname), []).append(item)
    for several in by_function.values():
        # An odd step, so that a sample does not hold one of two alternating values only.
        step = max(1, -(-len(several) // SAMPLED)) | 1
        for number, item in enumerate(several):
            if number % step:
                item.add_marker(pytest.mark.full)


@pytest.fixture(params=[pytest.param(GIVEN, marks=pytest.mark.gpu, id="gpu"), "cpu"])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Where to compute; products of float32 in float32, and dispatch as in a fresh process."""
    found = torch.device(request.param)
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device: FASTLENS_TEST_DEVICE=cpu runs the bodies without")
    monkeypatch.setattr(dispatch, "_CHOSEN", {})
    monkeypatch.setattr(dispatch, "_OPAQUE", set())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield found
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def waiting_is_an_error(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A context in which whatever makes the host wait for the GPU raises."""

    @contextlib.contextmanager
    def no_waiting() -> Iterator[None]:
        if device.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return no_waiting


class _Live(TorchDispatchMode):
    """Bytes of the tensors made inside and still alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self.known:
            return
        self.known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.known.discard(address)
            self.now -= size

        weakref.finalize(storage, gone)


@pytest.fixture
def peak_bytes(device: torch.device) -> Callable[[Callable[[], object]], int]:
    """``peak_bytes(run)``: the most memory that a call had at once beyond what was there before."""

    def measured(run: Callable[[], object]) -> int:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with _Live() as live:
            run()
        return live.peak

    return measured
