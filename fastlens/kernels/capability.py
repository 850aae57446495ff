"""The compute capability that kernels are chosen by: a GPU's own, or that of one not at hand."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_SUPPOSED: ContextVar[tuple[int, int] | None] = ContextVar("supposed capability", default=None)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Of that CUDA device, such as (9, 0); None where there is none, or where it is AMD's."""
    supposed = _SUPPOSED.get()
    if supposed is not None or device.type != "cuda":
        return supposed if device.type == "cuda" else None
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@contextlib.contextmanager
def supposing(wanted: tuple[int, int]) -> Iterator[None]:
    """Inside, kernels are refused and chosen as on a CUDA device of that capability."""
    token = _SUPPOSED.set(wanted)
    try:
        yield
    finally:
        _SUPPOSED.reset(token)
