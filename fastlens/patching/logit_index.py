"""Which logits an index names: worked out on row and column ids, without a logit.

`LogitIndex` is what a `lazy_logits.LazyLogits` stands for. An index goes to torch itself, applied
to the ids instead of the numbers, so that it means here what it means there.
"""

import functools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
# Indices that are remembered, and the elements of a tensor in one that is.
_KEPT = 1024
_KEPT_ELEMENTS = 4096
_INDEX_DTYPES = (torch.int64, torch.int32, torch.bool)


class LogitIndex:
    """Which logit each element of a tensor is: one row and one column of all logits.

    >>> all_logits(batch=1, n_pos=15, d_vocab=50257).indexed(operator.getitem, (0, -1)).ask.rows
    tensor([14])

    It knows no values, so it is made once for an index and kept for all runs of a sweep.

    Attributes:
        rows, columns: Ids, broadcast over each other to ``shape``. Each has size 1 along an axis
            where it does not vary, so that nothing of the size of the logits is ever made.
        d_vocab: Columns there are.
        is_copy: Torch copies for this, rather than making a view.
        is_settled: Nothing can be saved by waiting: one number, none, or a list of single logits.
    """

    def __init__(self, rows: Tensor, columns: Tensor, d_vocab: int, is_copy: bool) -> None:
        sizes = list(zip(rows.shape, columns.shape, strict=True))
        self.rows, self.columns, self.d_vocab, self.is_copy = rows, columns, d_vocab, is_copy
        self.shape: Shape = tuple(c if r == 1 else r for r, c in sizes)
        in_pairs = any(r > 1 and c > 1 for r, c in sizes)
        self.is_settled = not self.shape or 0 in self.shape or in_pairs
        self._kept: dict[Hashable, LogitIndex] = {}

    @functools.cached_property
    def ask(self) -> "Ask":
        """What to ask a source for."""
        with torch.inference_mode(False):
            rows, row_at = _distinct(self.rows)
            columns, column_at = _distinct(self.columns)
        row_axes = [axis for axis, size in enumerate(self.rows.shape) if size > 1]
        column_axes = [axis for axis, size in enumerate(self.columns.shape) if size > 1]
        asked = None if columns.numel() == self.d_vocab else columns
        if not row_axes or not column_axes or row_axes[-1] < column_axes[0]:
            return Ask(rows, asked, row_at, column_at, is_outer=True)
        row_at = _ids(rows.numel()) if row_at is None else row_at
        column_at = _ids(columns.numel()) if column_at is None else column_at
        at = (row_at.view(self.rows.shape), column_at.view(self.columns.shape))
        return Ask(rows, asked, *at, is_outer=False)

    def kept(
        self,
        how: Callable[..., "LogitIndex"],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> "LogitIndex":
        """``how(self, func, *args, **kwargs)``, made once for arguments that are alike."""
        try:
            key = (func, _key(args), *kwargs, _key(tuple(kwargs.values())))
        except TypeError:
            return how(self, func, *args, **kwargs)
        found = self._kept.get(key)
        if found is None:
            # Kept beyond the inference mode that it may be first needed in.
            with torch.inference_mode(False):
                found = how(self, func, *args, **kwargs)
            if found.is_copy and found.rows.numel() + found.columns.numel() > 2 * _KEPT_ELEMENTS:
                return found
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[key] = found
        return found

    def viewed(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> "LogitIndex":
        """By a function that makes views."""
        at = (func(ids.expand(self.shape), *args, **kwargs) for ids in (self.rows, self.columns))
        rows, columns = map(_unexpanded, at)
        return LogitIndex(rows, columns, self.d_vocab, is_copy=False)

    def gathered(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> "LogitIndex":
        """By `torch.gather`."""
        args = tuple(map(_on_cpu, args))
        kwargs = {name: _on_cpu(one) for name, one in kwargs.items()}
        at = (ids.expand(self.shape) for ids in (self.rows, self.columns))
        rows, columns = (func(ids, *args, **kwargs) for ids in at)
        return LogitIndex(rows, columns, self.d_vocab, is_copy=True)

    def selected(self, func: Callable[..., Tensor], dim: int, index: Tensor) -> "LogitIndex":
        """By `torch.index_select`."""
        inside = -len(self.shape) <= dim < len(self.shape)
        rows, columns = (
            # Of an axis that is not there, torch has to say so.
            func(ids, dim, _on_cpu(index))
            if not inside or ids.shape[dim] == self.shape[dim]
            else ids
            for ids in (self.rows, self.columns)
        )
        return LogitIndex(rows, columns, self.d_vocab, is_copy=True)

    def indexed(self, func: Callable[..., Tensor], index: Any) -> "LogitIndex":
        """By ``[index]``."""
        entries = _entries(index, self.shape)
        if entries is None:
            return self._unusual(index)
        tensors = [entry for entry in entries if isinstance(entry, Tensor)]
        if not tensors:
            return self.viewed(func, index)
        try:
            n_axes = len(torch.broadcast_shapes(*(one.shape for one in tensors)))
            rows = _picked(self.rows, entries, self.shape, n_axes)
            columns = _picked(self.columns, entries, self.shape, n_axes)
        except (IndexError, RuntimeError, ValueError):
            # Torch says best what is wrong with it.
            return self._unusual(index)
        return LogitIndex(rows, columns, self.d_vocab, is_copy=True)

    def _unusual(self, index: Any) -> "LogitIndex":
        """An index that only torch itself can read, or refuse: it indexes the ids themselves."""
        rows = self.rows.expand(self.shape)[index]
        columns = self.columns.expand(self.shape)[index]
        is_copy = rows.untyped_storage().data_ptr() != self.rows.untyped_storage().data_ptr()
        return LogitIndex(_unexpanded(rows), _unexpanded(columns), self.d_vocab, is_copy)


@dataclass(frozen=True, eq=False)
class Ask:
    """One call of a source, and how the block it gives becomes the values of a tensor.

    Attributes:
        rows: Ids, ascending, each once.
        columns: Likewise; None is the whole vocabulary.
        row_at, column_at: Which row and column of the block each element is. In an outer one, along
            the block's own two axes, and None if they already are in place.
    """

    rows: Tensor
    columns: Tensor | None
    row_at: Tensor | None
    column_at: Tensor | None
    is_outer: bool

    def arranged(self, block: Shaped[Tensor, "row column"]) -> Tensor:
        """The block's numbers in the order of the tensor's."""
        at = [
            None if ids is None else ids.to(block.device) for ids in (self.row_at, self.column_at)
        ]
        if not self.is_outer:
            return block[tuple(at)]
        for axis, ids in enumerate(at):
            block = block if ids is None else block.index_select(axis, ids)
        return block


@functools.lru_cache(maxsize=8)
def all_logits(batch: int, n_pos: int, d_vocab: int) -> LogitIndex:
    """Every logit ``[batch, pos, d_vocab]``; a row is ``example * n_pos + pos``."""
    rows = _ids(batch * n_pos).view(batch, n_pos, 1)
    return LogitIndex(rows, _ids(d_vocab).view(1, 1, d_vocab), d_vocab, is_copy=False)


@functools.lru_cache(maxsize=8)
def _ids(n: int) -> Int[Tensor, " n"]:
    with torch.inference_mode(False):
        return torch.arange(n, device="cpu")


def _unexpanded(ids: Tensor) -> Tensor:
    """Size 1 along the axes that only repeat."""
    if 0 not in ids.stride():
        return ids
    return ids[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in ids.stride())]


def _distinct(ids: Tensor) -> tuple[Int[Tensor, " id"], Int[Tensor, " n"] | None]:
    """The ids ascending, each once, and where each one went; None if all are in place."""
    flat = ids.reshape(-1)
    if flat.numel() < 2 or bool((flat[1:] > flat[:-1]).all()):
        return flat, None
    distinct, at = torch.unique(flat, return_inverse=True)
    return distinct, at


def _key(value: Any) -> Hashable:
    """Equal for arguments that name the same logits. Raises TypeError for what is not known."""
    kind = type(value)
    if kind is int or kind is range or value is None or value is ...:
        return value
    if kind is slice:
        return (slice, _key(value.start), _key(value.stop), _key(value.step))
    if kind is tuple or kind is list:
        return (kind, *map(_key, value))
    if kind is Tensor and value.dtype in _INDEX_DTYPES and value.device.type == "cpu":
        value = value.numpy()
    if isinstance(value, np.ndarray) and value.size <= _KEPT_ELEMENTS and value.dtype.kind in "bi":
        return (kind, value.dtype.str, value.shape, value.tobytes())
    raise TypeError


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _entries(index: Any, shape: Shape) -> list[Any] | None:
    """The index with one entry for each axis, and None for each new one.

    An entry is an int, a slice or a tensor of ids; masks are replaced by where they are true. None
    for an index of another kind, or one that does not fit.
    """
    if not isinstance(index, tuple):
        # Nested lists have meant different things in different versions of torch.
        if isinstance(index, np.ndarray) and index.ndim != 1:
            return None
        if isinstance(index, Sequence) and not all(isinstance(one, int) for one in index):
            return None
        index = (index,)
    parts = [_entry(part) for part in index]
    used = sum(_n_axes(part) for part in parts if part is not None and part is not ...)
    if any(part is NotImplemented for part in parts):
        return None
    if not any(part is ... for part in parts):
        parts.append(...)
    entries, axis = [], 0
    for part in parts:
        if part is None:
            entries.append(None)
            continue
        n_axes = len(shape) - used if part is ... else _n_axes(part)
        if part is ...:
            entries += [slice(None)] * n_axes
        elif isinstance(part, Tensor) and part.dtype == torch.bool:
            if part.shape != shape[axis : axis + n_axes]:
                return None
            entries += part.nonzero(as_tuple=True)
        else:
            entries.append(part)
        axis += n_axes
    return entries


def _n_axes(part: Any) -> int:
    return part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _entry(part: Any) -> Any:
    """One part of an index in its simplest form; NotImplemented if it is of no usual kind."""
    if part is None or part is ... or isinstance(part, slice) or type(part) is int:
        return part
    if isinstance(part, Tensor):
        ids = part.cpu()
        if ids.ndim == 0:
            return int(ids) if ids.dtype == torch.int64 else NotImplemented
    elif isinstance(part, (Sequence, np.ndarray)):
        try:
            ids = torch.tensor(part, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            return NotImplemented
        if ids.numel() == 0 and isinstance(part, Sequence):
            ids = ids.long()
    else:
        try:
            return NotImplemented if isinstance(part, bool) else operator.index(part)
        except TypeError:
            return NotImplemented
    return ids if ids.ndim > 0 and ids.dtype in _INDEX_DTYPES else NotImplemented


def _picked(ids: Tensor, entries: list[Any], shape: Shape, n_axes: int) -> Tensor:
    """The ids at an index with tensors in it; of size 1 still where they do not vary.

    Args:
        shape: What the ids stand for, repeated along the axes of size 1.
        n_axes: Of the tensors in the index, broadcast together.
    """
    own, axis = [], 0
    for entry in entries:
        if entry is None:
            own.append(None)
            continue
        varies = ids.shape[axis] == shape[axis]
        axis += 1
        if not varies and isinstance(entry, Tensor):
            # As many axes as all of them have together, for the result to have its axes in place.
            entry = _ids(1).view((1,) * n_axes)
        elif not varies:
            entry = 0 if isinstance(entry, int) else slice(None)
        own.append(entry)
    return ids[tuple(own)]
