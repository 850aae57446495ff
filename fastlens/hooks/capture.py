"""What happens to an activation on its way into a cache: detach, slice, copy, move."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.hooks.point import HookPoint
from fastlens.slices import Slice


@dataclass(frozen=True)
class CaptureSpec:
    """How a cache keeps activations: which positions, on which device, with a batch axis or not."""

    pos_slice: Slice
    device: torch.device | str | None = None
    remove_batch_dim: bool = False


def capture(activation: Tensor, point: HookPoint, spec: CaptureSpec) -> Tensor:
    """The tensor a cache keeps: sliced first, moved last, so nothing larger is copied or held.

    Raises: ShapeError if the batch axis is to go and the batch is not one.
    """
    kept = activation.detach()
    pos = None
    if spec.pos_slice.mode != "identity":
        pos = point.axis("pos", kept.ndim)
        pos = point.axis("query_pos", kept.ndim) if pos is None else pos
    if pos is not None:
        # A cache must not keep the whole activation alive behind a view.
        kept = spec.pos_slice.apply(kept, dim=pos).clone()
    if spec.remove_batch_dim and (point.axes is None or point.axes.startswith("batch ")):
        if kept.shape[0] != 1:
            raise ShapeError(
                f"remove_batch_dim=True needs a batch of one; {point.name!r} has batch "
                f"{kept.shape[0]}. Drop remove_batch_dim, or run one prompt."
            )
        kept = kept[0]
    return kept if spec.device is None else kept.to(spec.device)


def capture_hook(cache: dict[str, Tensor], key: str, spec: CaptureSpec) -> Callable[..., Any]:
    """A hook that puts ``capture(activation)`` into ``cache[key]``."""
    return partial(_save, cache, key, spec)


def _save(
    cache: dict[str, Tensor], key: str, spec: CaptureSpec, activation: Tensor, hook: HookPoint
) -> None:
    cache[key] = capture(activation, hook, spec)
