"""What a sweep may take: of free memory, or of what a streamed model's limit leaves."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from fastlens.errors import StreamError
from fastlens.memory import bytes_of, free_bytes
from fastlens.patching.spill import free_on_disk
from fastlens.patching.strategy import Strategy
from fastlens.patching.traffic import ON_DISK, ON_HOST, Means, Passes

# Part of the free memory that a sweep takes unless told.
FREE_SHARE = 0.5
# Part of a disk's free room that rows may take.
DISK_SHARE = 0.8
# Part of what a streamed model leaves that is not planned with: memory is freed in pages, and
# Python's own objects are not counted.
SLACK_SHARE = 1 / 16
# What the C library and the libraries of products keep for themselves, beside half of the rows.
HOLES_BYTES = 16 * 2**20


@runtime_checkable
class StreamedWeights(Protocol):
    """What is asked of a model whose weights are read as they are needed."""

    @property
    def block_bytes(self) -> Any:
        """Bytes of each layer's weights."""
        ...

    def room(self) -> int:
        """Bytes that activations may take now."""
        ...

    def reserve(self, n: int) -> Any:
        """A context in which weights leave ``n`` bytes to the caller."""
        ...


def streaming_of(model: Any) -> StreamedWeights | None:
    """The model's streamed weights, if they are streamed."""
    return getattr(model, "streaming", None)


def allowed_bytes(model: Any, memory: int | str | None) -> int:
    """What a sweep of this model may take beside model and results.

    Args:
        memory: As the user gave it. A streamed model's own limit holds in any case.
    """
    device = torch.device(model.cfg.device)
    asked = None if memory is None else bytes_of(memory)
    streaming = streaming_of(model)
    if streaming is not None:
        try:
            room = streaming.room()
        except StreamError:
            # It has no limit.
            pass
        else:
            room = max(1, room - int(room * SLACK_SHARE))
            return room if asked is None else min(room, asked)
    return int(free_bytes(device) * FREE_SHARE) if asked is None else asked


def means_of(model: Any, folder: Path | None = None) -> Means:
    """What another pass over the layers costs this model, and where rows may wait."""
    streaming = streaming_of(model)
    if streaming is None:
        return Means()
    weights = tuple(int(n) for n in streaming.block_bytes)
    if torch.device(model.cfg.device).type == "cpu":
        return Means(weights, ON_DISK, int(free_on_disk(folder) * DISK_SHARE))
    return Means(weights, ON_HOST, int(free_bytes("cpu") * FREE_SHARE))


@contextlib.contextmanager
def reserved(model: Any, strategy: Strategy, passes: Passes, memory: int) -> Iterator[None]:
    """In the block, a streamed model's weights leave the wave what it is predicted to take.

    Args:
        memory: What the sweep is allowed.

    Raises: MemoryLimitError if that is no longer free.
    """
    streaming = streaming_of(model)
    if streaming is None or not strategy.is_wave:
        # Hooked forwards keep to the model's limit by themselves.
        yield
        return
    # What is freed stays with the process for a while, in holes between what is not.
    holes = passes.held // 2 + HOLES_BYTES
    with streaming.reserve(max(passes.held, min(memory, passes.held + holes))):
        yield
