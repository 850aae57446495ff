"""What happens to an activation on its way into a cache: detach, slice, copy, move."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlens.errors import LayerError, ShapeError
from fastlens.hooks.derived import CacheDict, Derived
from fastlens.hooks.of_heads import head_axis
from fastlens.hooks.point import HookFunction, HookPoint
from fastlens.ops.capture import capture as gather
from fastlens.slices import Slice, whole_numbers

# Query heads to keep: the same in all layers, or for each layer that is named.
Heads: TypeAlias = Sequence[int] | Mapping[int, Sequence[int]] | None


@dataclass(frozen=True)
class CaptureSpec:
    """How a cache keeps activations.

    Attributes:
        pos_slice: Which positions.
        device: Where; None leaves them where they are.
        remove_batch_dim: Drop the batch axis.
        heads: Which query heads.
        group_size: Query heads that read one KV head.
    """

    pos_slice: Slice
    device: torch.device | str | None = None
    remove_batch_dim: bool = False
    heads: Heads = None
    group_size: int = 1

    def heads_at(self, point: HookPoint) -> list[int] | None:
        """The entries of that place's head axis to keep; None for all."""
        chosen = self.heads
        if isinstance(chosen, Mapping):
            chosen = chosen.get(point.layer()) if "blocks." in (point.name or "") else None
        if chosen is None:
            return None
        names = point.axes.split() if point.axes else []
        if "kv_head" in names:
            return sorted({head // self.group_size for head in chosen})
        return list(chosen) if "head" in names or not names else None

    @property
    def keeps_all(self) -> bool:
        """Whether activations are kept whole."""
        return self.pos_slice.mode == "identity" and self.heads is None


@dataclass
class CapturePlan:
    """What one run is to capture, and how.

    Attributes:
        cache: What it fills.
        fwd, bwd: Hooks to put on.
        taps: Attention layers and what to show their queries and keys to.
    """

    cache: dict[str, Tensor]
    fwd: Sequence[tuple[str | Callable[[str], bool], HookFunction]]
    bwd: Sequence[tuple[str | Callable[[str], bool], HookFunction]]
    taps: list[tuple[Any, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def tapping(self) -> Iterator[None]:
        """The taps are on in the block, and off however it ends."""
        before = [(layer, layer.tap) for layer, _ in self.taps]
        try:
            for layer, tap in self.taps:
                layer.tap = tap
            yield
        finally:
            for layer, tap in before:
                layer.tap = tap


def capture(activation: Tensor, point: HookPoint, spec: CaptureSpec) -> Tensor:
    """The tensor a cache keeps: sliced first, moved last, so nothing larger is copied or held.

    Raises: ShapeError if the batch axis is to go and the batch is not one, or for heads that are
        not there.
    """
    kept = activation.detach()
    choices: dict[int, Slice] = {}
    heads = None if spec.heads is None else spec.heads_at(point)
    if heads is not None:
        # A point that does not name its axes is an error here.
        axis = head_axis(point, kept.ndim)
        assert axis is not None
        check_heads(heads, kept.shape[axis], point.name)
        choices[axis] = Slice([*heads])
    if spec.pos_slice.mode != "identity":
        pos = point.axis("pos", kept.ndim)
        pos = point.axis("query_pos", kept.ndim) if pos is None else pos
        if pos is not None:
            choices[pos] = spec.pos_slice
    if choices:
        # A cache must not keep the whole activation alive behind a view.
        kept = _sliced(kept, choices)
    kept = without_batch(kept, point, spec)
    return kept if spec.device is None else kept.to(spec.device)


def _sliced(kept: Tensor, choices: Mapping[int, Slice]) -> Tensor:
    if kept.is_floating_point():
        return gather(kept, [choices.get(axis, Slice()) for axis in range(max(choices) + 1)])
    for axis in sorted(choices, reverse=True):  # an int drops its axis
        kept = choices[axis].apply(kept, dim=axis)
    return kept.clone()


def without_batch(kept: Tensor, point: HookPoint, spec: CaptureSpec) -> Tensor:
    """Without the batch axis, if the spec says so and the place has one.

    Raises: ShapeError if the batch is not one.
    """
    if spec.remove_batch_dim and (point.axes is None or point.axes.startswith("batch ")):
        if kept.shape[0] != 1:
            raise ShapeError(
                f"remove_batch_dim=True needs a batch of one; {point.name!r} has batch "
                f"{kept.shape[0]}. Drop remove_batch_dim, or run one prompt."
            )
        return kept[0]
    return kept


def chosen_heads(heads: Heads, model: Any) -> Heads:
    """The heads of a run, as lists of ints.

    Raises: ShapeError for what are no indices; LayerError for a layer that is not there.
    """
    if heads is None:
        return None
    if not isinstance(heads, Mapping):
        return whole_numbers(heads, "heads")
    n_layers = getattr(getattr(model, "cfg", None), "n_layers", None)
    for layer in heads:
        if n_layers is not None and layer not in range(n_layers):
            raise LayerError(
                f"heads= names layer {layer!r}, and the model has layers 0 to {n_layers - 1}."
            )
    return {layer: whole_numbers(some, f"heads[{layer}]") for layer, some in heads.items()}


def check_heads(heads: Sequence[int], n_heads: int, name: str | None) -> None:
    """Raises: ShapeError for heads that are not there."""
    if not heads or min(heads) < 0 or max(heads) >= n_heads:
        raise ShapeError(
            f"heads={list(heads)} of {name!r}, which has {n_heads} heads: give some of 0 to "
            f"{n_heads - 1}."
        )


def capture_hook(cache: dict[str, Tensor], key: str, spec: CaptureSpec) -> Callable[..., Any]:
    """A hook that puts ``capture(activation)`` into ``cache[key]``."""
    return partial(_save, cache, key, spec)


def _save(
    cache: dict[str, Tensor], key: str, spec: CaptureSpec, activation: Tensor, hook: HookPoint
) -> None:
    kept = capture(activation, hook, spec)
    if isinstance(cache, CacheDict):
        cache.capture(key, kept)
    else:
        cache[key] = kept


def derive_hook(
    cache: CacheDict,
    key: str,
    spec: CaptureSpec,
    formula: Callable[..., Tensor],
    sources: Sequence[str],
) -> Callable[..., Any]:
    """A hook that puts into ``cache[key]`` how to compute the activation from captured ones.

    If a source was not captured in this run, the activation itself is kept.
    """
    return partial(_derive, cache, key, spec, formula, sources)


def _derive(
    cache: CacheDict,
    key: str,
    spec: CaptureSpec,
    formula: Callable[..., Tensor],
    sources: Sequence[str],
    activation: Tensor,
    hook: HookPoint,
) -> None:
    cache.repeated = cache.repeated or key in cache
    found = {name: cache.entry(name) for name in sources if name in cache}
    # Writes to an inference tensor go unnoticed.
    if len(found) < len(sources) or cache.repeated or activation.is_inference():
        cache[key] = capture(activation, hook, spec)
        return
    like = without_batch(activation.detach(), hook, spec)
    cache.put(key, Derived(key, formula, found, like.shape, like.dtype))
