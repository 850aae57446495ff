"""The record a kernel module ends in, by which dispatch finds and chooses it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op.

    ``refuses(device, dtype)`` returns a sentence saying why this kernel cannot serve that device
    and dtype here, or None if it can. Of those that can, the highest ``priority`` is chosen.
    ``is_opaque``: torch cannot look into it (Triton, csrc/), so it must be called through its
    registered op, which knows its shapes and its gradient.
    """

    op: str
    name: str
    fn: Callable[..., Any]
    refuses: Callable[[torch.device, torch.dtype], str | None]
    priority: int = 0
    is_opaque: bool = False

    @property
    def is_for_gpus(self) -> bool:
        """Whether it is made for GPUs (Triton, csrc/). No one has run one of those on a GPU yet."""
        return self.fn.__module__.rpartition(".")[2].startswith(("triton_", "cuda_"))
