"""What happens to an activation on its way into a cache: detach, slice, copy, move."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlens.errors import ConfigError, LayerError, ShapeError, did_you_mean
from fastlens.hooks.copies import Copies
from fastlens.hooks.derived import CacheDict, Derived, Source, Stored
from fastlens.hooks.of_heads import head_axis
from fastlens.hooks.point import HookFunction, HookPoint
from fastlens.ops.capture import capture as gather
from fastlens.ops.outlier_rows import Int8OutlierRows, capture_int8_outliers, packed_bytes
from fastlens.slices import Slice, whole_numbers

# Query heads to keep: the same in all layers, or for each layer that is named.
Heads: TypeAlias = Sequence[int] | Mapping[int, Sequence[int]] | None
# What activations can be kept as, by name.
KEPT_AS = {
    "float64": torch.float64, "fp64": torch.float64, "double": torch.float64,
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "int8": torch.int8,
}  # fmt: skip


class _Last:
    """The activation that was captured last, and what was kept of it.

    Where no hook edits it, one activation passes two places in turn, and is kept once.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, int, Any] = (None, -1, None)
        self._kept: Stored | None = None

    def kept(self, activation: Tensor, how: Any) -> Stored | None:
        """What was kept of it, if this is the one, unchanged, and to be kept the same way."""
        seen, version, as_what = self._seen
        same = seen is not None and seen() is activation and as_what == how
        return self._kept if same and version == activation._version else None

    def remember(self, activation: Tensor, how: Any, kept: Stored) -> None:
        """Called with what is kept of an activation."""
        self._seen, self._kept = (weakref.ref(activation), activation._version, how), kept


@dataclass(frozen=True)
class CaptureSpec:
    """How a cache keeps activations.

    Attributes:
        pos_slice: Which positions.
        device: Where; None leaves them where they are.
        remove_batch_dim: Drop the batch axis.
        heads: Which query heads.
        group_size: Query heads that read one KV head.
        dtype: Of floats; int8 is `Int8OutlierRows`. None keeps each activation's own.
        last: What was captured last.
        copies: Copies to another device that need not be there yet; None makes each wait.
    """

    pos_slice: Slice
    device: torch.device | str | None = None
    remove_batch_dim: bool = False
    heads: Heads = None
    group_size: int = 1
    dtype: torch.dtype | None = None
    last: _Last = field(default_factory=_Last, compare=False, repr=False)
    copies: Copies | None = field(default=None, compare=False, repr=False)

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

    def new_cache(self) -> dict[str, Tensor]:
        """A dict that can hold what is kept; a plain one if that will do."""
        return CacheDict() if self.dtype == torch.int8 else {}

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


def capture(activation: Tensor, point: HookPoint, spec: CaptureSpec) -> Stored:
    """What a cache keeps: sliced, then cast or packed, then moved, so nothing larger is copied.

    With a ``dtype`` nothing larger is held either; without one, what is not sliced shares memory
    with the run.

    Raises: ShapeError if the batch axis is to go and the batch is not one, or for heads that are
        not there.
    """
    # An inference tensor does not count its edits, nor does anybody those through ``.data``.
    once = spec.dtype is not None and not activation.is_inference() and len(point.fwd_hooks) < 2
    how = (point.axes, None if spec.heads is None else spec.heads_at(point)) if once else None
    if once and (known := spec.last.kept(activation, how)) is not None:
        return known
    kept = keep(_chosen(activation, point, spec), spec, activation)
    if once:
        spec.last.remember(activation, how, kept)
    return kept


def keep(chosen: Tensor, spec: CaptureSpec, activation: Tensor | None = None) -> Stored:
    """A chosen part of an activation as the cache is to hold it: cast or packed, and moved.

    Args:
        activation: What it may share memory with, and the run goes on with.
    """
    kept: Stored = chosen
    if spec.dtype is not None:
        kept = owned(packed(chosen) if spec.dtype == torch.int8 else cast_to(chosen, spec.dtype))
    if spec.device is None:
        return kept
    if spec.copies is None or isinstance(kept, Int8OutlierRows):
        return kept.to(spec.device)
    is_owned = activation is not None and not _share_memory(kept, activation)
    return spec.copies.to(kept, spec.device, is_owned)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def cast_to(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats in that dtype; whole numbers and truth values stay as they are."""
    return chosen.to(dtype) if chosen.is_floating_point() else chosen


def packed(chosen: Tensor) -> Stored:
    """In 8 bits a number, where that is smaller; else as it is."""
    if not chosen.is_floating_point() or chosen.ndim == 0 or chosen.numel() == 0:
        return chosen
    if packed_bytes(chosen.shape, chosen.dtype) >= chosen.nbytes:
        return chosen
    return capture_int8_outliers(chosen)


def owned(kept: Stored) -> Stored:
    """The same in memory of its own: a view must not keep a larger tensor alive."""
    if isinstance(kept, Int8OutlierRows) or kept.untyped_storage().nbytes() <= kept.nbytes:
        return kept
    return kept.clone(memory_format=torch.contiguous_format)


def kept_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """What ``dtype=`` of a capture means.

    Raises: ConfigError for what activations cannot be kept as.
    """
    found = dtype
    if isinstance(dtype, str):
        found = KEPT_AS.get(dtype.removeprefix("torch."))
    if found is not None and found not in KEPT_AS.values():
        found = None
    if dtype is not None and found is None:
        near = did_you_mean(dtype, KEPT_AS) if isinstance(dtype, str) else ""
        raise ConfigError(
            f"activations cannot be kept as dtype={dtype!r}.{near} Give one of "
            f"{', '.join(KEPT_AS)}, or None for each one's own."
        )
    return found  # type: ignore[return-value]


def _chosen(activation: Tensor, point: HookPoint, spec: CaptureSpec) -> Tensor:
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
        kept = _sliced(kept, choices, spec.dtype)
    return without_batch(kept, point, spec)


def _sliced(kept: Tensor, choices: Mapping[int, Slice], dtype: torch.dtype | None) -> Tensor:
    if kept.is_floating_point():
        where = [choices.get(axis, Slice()) for axis in range(max(choices) + 1)]
        return gather(kept, where, None if dtype == torch.int8 else dtype)
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
    fill(cache, key, capture(activation, hook, spec))


def fill(cache: dict[str, Tensor], key: str, kept: Stored) -> None:
    """Put what was captured into a cache of either kind."""
    if isinstance(cache, CacheDict):
        cache.capture(key, kept)
    else:
        cache[key] = kept.read() if isinstance(kept, Int8OutlierRows) else kept


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
    found: dict[str, Source] = {}
    for name in sources:
        entry = cache.entry(name) if name in cache else None
        if isinstance(entry, Tensor | Derived):
            found[name] = entry
    # Writes to an inference tensor go unnoticed.
    if len(found) < len(sources) or cache.repeated or activation.is_inference():
        cache.capture(key, capture(activation, hook, spec))
        return
    like = without_batch(activation.detach(), hook, spec)
    cache.put(key, Derived(key, formula, found, like.shape, like.dtype))
