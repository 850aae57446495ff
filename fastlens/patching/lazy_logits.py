"""The logits that a sweep hands to a metric: computed where the metric looks, and nowhere else.

`LazyLogits` is that tensor and `LogitSource` what it asks; `reads_of` finds out beforehand which
logits a metric looks at. Where logits come from is not known here.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.errors import MetricError

Shape: TypeAlias = tuple[int, ...]
# Indices that are remembered, and the elements of a tensor in one that is.
_KEPT = 1024
_KEPT_ELEMENTS = 4096


@runtime_checkable
class LogitSource(Protocol):
    """Whatever can compute logits by row and column.

    Attributes:
        dtype, device: Of the logits.
    """

    dtype: torch.dtype
    device: torch.device

    def block(
        self, rows: Int[Tensor, " row"], columns: Int[Tensor, " column"] | None
    ) -> Float[Tensor, "row column"]:
        """The logits of some rows, final: soft-cap, scale and bias are in them.

        Args:
            rows: ``example * n_pos + pos``, ascending, each once, on the CPU; not to be written to.
            columns: Token ids, likewise; None is the whole vocabulary.

        Returns:
            A tensor that the caller may keep and write into: not a view of the source's own.
        """
        ...


class LazyLogits(Tensor):
    """Logits ``[batch, pos, d_vocab]`` that are computed where they are looked at.

    >>> logits = LazyLogits(source, batch=1, n_pos=15, d_vocab=50257)
    >>> logits[0, -1, 11] - logits[0, -1, 22]  # two logits are computed, not 753,855

    An index of any kind, `gather`, `select`, `narrow`, `index_select`, `squeeze`, `unsqueeze`,
    `detach`, iteration over examples or positions and a cast keep what they can for later; a result
    that still is a ``LazyLogits`` has the shape and dtype of what it stands for. Every other
    operation computes what is left of its arguments (`full`) and runs on that. Shape, dtype, device
    and what follows from them cost nothing. What was computed is kept for the next use.

    Numerics: the source's own numbers, moved and cast but never changed; contiguous, where torch
    may have a view with gaps, so that a sum over them may differ in the last bit.

    Raises: MetricError where a metric writes into the logits; a copy that it makes is its own.
        Otherwise what torch raises, such as IndexError.
    """

    _source: LogitSource
    _where: "_Where"
    # The dtypes it was cast to, in order.
    _casts: tuple[torch.dtype, ...]
    _memory: "_Memory"
    _plain: Tensor | None

    def __new__(cls, source: LogitSource, batch: int, n_pos: int, d_vocab: int) -> "LazyLogits":
        """All logits of a run.

        Args:
            source: Computes them; its rows are ``example * n_pos + pos``.
        """
        return _stand_in(source, _everywhere(batch, n_pos, d_vocab), (), _Memory(is_copy=False))

    def full(self) -> Tensor:
        """All that this tensor stands for, as a plain tensor; computed at the first call."""
        self._memory.check(self._plain)
        if self._plain is None:
            self._plain = self._computed(self._where)
            self._memory.hand_out(self._plain)
        return self._plain

    def __getitem__(self, index: Any) -> Tensor:
        """As torch's, computing no logit that the index does not name."""
        return self._derived(_Where.indexed, operator.getitem, (index,), {})

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if args and isinstance(args[0], LazyLogits):
            if func in _LAZY and "out" not in kwargs:
                return _LAZY[func](func, *args, **kwargs)
            if _writes(name):
                args[0]._check_writable(name)
        for target in _listed(kwargs.get("out")):
            if isinstance(target, LazyLogits):
                target._check_writable(f"{name}(out=)")
        if func in _OF_DTYPE_AND_DEVICE:
            args = tuple(one._scalar() if isinstance(one, LazyLogits) else one for one in args)
        return func(*plain(args), **plain(kwargs))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for target in _listed(args[i] if i < len(args) else kwargs.get(argument.name)):
                if isinstance(target, LazyLogits):
                    target._check_writable(str(func))
        return func(*plain(args), **plain(kwargs))

    def _derived(
        self,
        how: Callable[..., "_Where"],
        func: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """``func(self, *args, **kwargs)``, where ``how`` knows which logits that takes."""
        if self._plain is not None:
            return func(self.full(), *plain(args), **plain(kwargs))
        self._memory.check()
        where = self._where.kept(how, func, args, kwargs)
        memory = _Memory(is_copy=True) if where.is_copy else self._memory
        if where.is_settled:
            taken = self._computed(where)
        else:
            taken = _stand_in(self._source, where, self._casts, memory)
        if memory.is_copy:
            memory.see(taken)
        return taken

    def _computed(self, where: "_Where") -> Tensor:
        if 0 in where.shape:
            return self._scalar().new_empty(where.shape)
        ask = where.ask
        values = ask.arranged(self._source.block(ask.rows, ask.columns)).reshape(where.shape)
        for dtype in self._casts:
            values = values.to(dtype)
        return values

    def _scalar(self) -> Tensor:
        """A number of its dtype on its device, where nothing else about it matters."""
        dtype = self._casts[-1] if self._casts else self._source.dtype
        return torch.zeros((), dtype=dtype, device=self._source.device)

    def _check_writable(self, name: str) -> None:
        if not self._memory.is_only_seen_by(self, self._plain):
            raise _impure(f"writes into the logits in place ({name})")


def plain(value: Any) -> Any:
    """The value with every `LazyLogits` in it, or in its tuples, lists and dicts, computed."""
    if isinstance(value, LazyLogits):
        return value.full()
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {key: plain(one) for key, one in value.items()}
    return value


def _stand_in(
    source: LogitSource, where: "_Where", casts: tuple[torch.dtype, ...], memory: "_Memory"
) -> LazyLogits:
    dtype = casts[-1] if casts else source.dtype
    lazy = Tensor._make_wrapper_subclass(LazyLogits, where.shape, dtype=dtype, device=source.device)
    lazy._source, lazy._where, lazy._casts, lazy._memory = source, where, casts, memory
    lazy._plain = None
    return lazy


# -- what a metric writes ------------------------------------------------------------------------


class _Memory:
    """One piece of memory as plain torch would have it: the logits, or a copy made of a part.

    Attributes:
        is_copy: A metric may write into a copy that it made, if nothing else looks into it.
        seen_by: Tensors that look into a copy.
        handed_out: Parts that were computed, each on its own, with their versions at that time.
            Once one was written into, what else is computed here would not show it.
    """

    __slots__ = ("handed_out", "is_copy", "seen_by")

    def __init__(self, is_copy: bool) -> None:
        self.is_copy = is_copy
        self.seen_by: list[weakref.ref[Tensor]] = []
        self.handed_out: list[tuple[weakref.ref[Tensor], int]] = []

    def see(self, tensor: Tensor) -> None:
        self.seen_by = [one for one in self.seen_by if one() is not None]
        self.seen_by.append(weakref.ref(tensor))

    def is_only_seen_by(self, tensor: Tensor, own: Tensor | None) -> bool:
        """Whether it is a copy, and nothing but a tensor and ``own``, its values, is left of it."""
        known = (None, tensor, None if own is None else _base(own))
        alive = [one() for one in (*self.seen_by, *(part for part, _ in self.handed_out))]
        return self.is_copy and all(any(one is other for other in known) for one in alive)

    def hand_out(self, part: Tensor) -> None:
        if not part.is_inference():
            # Views keep their base alive, and count writes with it.
            self.handed_out.append((weakref.ref(_base(part)), part._version))

    def check(self, own: Tensor | None = None) -> None:
        """Raises MetricError if a part was written into: of a copy, another than ``own``."""
        if not self.handed_out:
            return
        alive = [(part(), version) for part, version in self.handed_out]
        for part, version in alive:
            if part is None or part._version == version:
                continue
            if own is None or not self.is_copy or part is not _base(own):
                raise _impure("wrote into the logits through a view, and then read them again")
        self.handed_out = [(weakref.ref(part), v) for part, v in alive if part is not None]


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _writes(name: str) -> bool:
    return name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def _impure(did: str) -> MetricError:
    return MetricError(
        f"the metric {did}. It must leave them as they are: they are computed only where it looks. "
        f"Write into a copy: x = logits[:, -1].clone()."
    )


# -- which logits a tensor stands for ------------------------------------------------------------


class _Where:
    """Which logit each element of a tensor is: one row and one column of all logits.

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
        self._kept: dict[Hashable, _Where] = {}

    @functools.cached_property
    def ask(self) -> "_Ask":
        """What to ask a source for."""
        rows, row_at = _distinct(self.rows)
        columns, column_at = _distinct(self.columns)
        row_axes = [axis for axis, size in enumerate(self.rows.shape) if size > 1]
        column_axes = [axis for axis, size in enumerate(self.columns.shape) if size > 1]
        asked = None if columns.numel() == self.d_vocab else columns
        if not row_axes or not column_axes or row_axes[-1] < column_axes[0]:
            return _Ask(rows, asked, row_at, column_at, is_outer=True)
        row_at = _ids(rows.numel()) if row_at is None else row_at
        column_at = _ids(columns.numel()) if column_at is None else column_at
        at = (row_at.view(self.rows.shape), column_at.view(self.columns.shape))
        return _Ask(rows, asked, *at, is_outer=False)

    def kept(
        self,
        how: Callable[..., "_Where"],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> "_Where":
        """``how(self, func, *args, **kwargs)``, made once for arguments that are alike."""
        try:
            key = (func, _key(args), *kwargs, _key(tuple(kwargs.values())))
        except TypeError:
            return how(self, func, *plain(args), **plain(dict(kwargs)))
        found = self._kept.get(key)
        if found is None:
            found = how(self, func, *args, **kwargs)
            if found.is_copy and found.rows.numel() + found.columns.numel() > 2 * _KEPT_ELEMENTS:
                return found
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[key] = found
        return found

    def viewed(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> "_Where":
        """By a function that makes views."""
        at = (func(ids.expand(self.shape), *args, **kwargs) for ids in (self.rows, self.columns))
        rows, columns = map(_unexpanded, at)
        return _Where(rows, columns, self.d_vocab, is_copy=False)

    def gathered(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> "_Where":
        """By `torch.gather`."""
        args = tuple(map(_on_cpu, args))
        kwargs = {name: _on_cpu(one) for name, one in kwargs.items()}
        at = (ids.expand(self.shape) for ids in (self.rows, self.columns))
        rows, columns = (func(ids, *args, **kwargs) for ids in at)
        return _Where(rows, columns, self.d_vocab, is_copy=True)

    def selected(self, func: Callable[..., Tensor], dim: int, index: Tensor) -> "_Where":
        """By `torch.index_select`."""
        inside = -len(self.shape) <= dim < len(self.shape)
        rows, columns = (
            # Of an axis that is not there, torch has to say so.
            func(ids, dim, _on_cpu(index))
            if not inside or ids.shape[dim] == self.shape[dim]
            else ids
            for ids in (self.rows, self.columns)
        )
        return _Where(rows, columns, self.d_vocab, is_copy=True)

    def indexed(self, func: Callable[..., Tensor], index: Any) -> "_Where":
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
        return _Where(rows, columns, self.d_vocab, is_copy=True)

    def _unusual(self, index: Any) -> "_Where":
        """An index that only torch itself can read, or refuse: it indexes the ids themselves."""
        rows = self.rows.expand(self.shape)[index]
        columns = self.columns.expand(self.shape)[index]
        is_copy = rows.untyped_storage().data_ptr() != self.rows.untyped_storage().data_ptr()
        return _Where(_unexpanded(rows), _unexpanded(columns), self.d_vocab, is_copy)


@dataclass(frozen=True, eq=False)
class _Ask:
    """One call of a source, and how the block it gives becomes the values of a tensor.

    Attributes:
        rows, columns: See `LogitSource.block`.
        row_at, column_at: Which row and column of the block each element is. In an outer one, along
            the block's own two axes, and None if they already are in place.
    """

    rows: Tensor
    columns: Tensor | None
    row_at: Tensor | None
    column_at: Tensor | None
    is_outer: bool

    def arranged(self, block: Tensor) -> Tensor:
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
def _everywhere(batch: int, n_pos: int, d_vocab: int) -> _Where:
    rows = _ids(batch * n_pos).view(batch, n_pos, 1)
    return _Where(rows, _ids(d_vocab).view(1, 1, d_vocab), d_vocab, is_copy=False)


@functools.lru_cache(maxsize=8)
def _ids(n: int) -> Int[Tensor, " n"]:
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


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


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
    n_gaps = sum(part is ... for part in parts)
    if any(part is NotImplemented for part in parts) or n_gaps > 1 or used > len(shape):
        return None
    if n_gaps == 0:
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


# -- the functions of torch that need not compute everything -------------------------------------


def _deriving(how: Callable[..., _Where]) -> Callable[..., Tensor]:
    def derived(
        func: Callable[..., Tensor], logits: LazyLogits, *args: Any, **kwargs: Any
    ) -> Tensor:
        return logits._derived(how, func, args, kwargs)

    return derived


def _unbound(func: Callable[..., Any], logits: LazyLogits, dim: int = 0) -> tuple[Tensor, ...]:
    where = logits._where
    n_axes = len(where.shape)
    # One token after the other, or one number: all are computed together.
    if n_axes == 1 or not -n_axes <= dim < n_axes or where.columns.shape[dim] > 1:
        return func(logits.full(), dim)
    each = range(where.shape[dim])
    return tuple(logits._derived(_Where.viewed, Tensor.select, (dim, i), {}) for i in each)


def _iterated(func: Callable[..., Any], logits: LazyLogits) -> Any:
    return iter(_unbound(Tensor.unbind, logits))


def _converted(func: Callable[..., Any], logits: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    before = logits._scalar()
    after = func(before, *args, **kwargs)
    if after is before:
        return logits
    if not isinstance(after, Tensor):
        return after
    if logits._plain is not None or after.device != before.device:
        return func(logits.full(), *args, **kwargs)
    logits._memory.check()
    casts = (*logits._casts, after.dtype)
    memory = _Memory(is_copy=True)
    converted = _stand_in(logits._source, logits._where, casts, memory)
    memory.see(converted)
    return converted


def _methods(names: str) -> list[Any]:
    """Those of a tensor by their names; an attribute is known by its getter."""
    found = [getattr(Tensor, name) for name in names.split() if hasattr(Tensor, name)]
    return [one if callable(one) else one.__get__ for one in found]


def _functions(names: str) -> list[Any]:
    """The same functions in ``torch`` and as methods."""
    return _methods(names) + [getattr(torch, one) for one in names.split() if hasattr(torch, one)]


_INDEX_DTYPES = (torch.int64, torch.int32, torch.bool)
_LAZY: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_functions("select narrow squeeze unsqueeze detach"), _deriving(_Where.viewed)),
    **dict.fromkeys(_methods("data"), _deriving(_Where.viewed)),
    **dict.fromkeys(_methods("__getitem__"), _deriving(_Where.indexed)),
    **dict.fromkeys(_functions("gather"), _deriving(_Where.gathered)),
    **dict.fromkeys(_functions("index_select"), _deriving(_Where.selected)),
    **dict.fromkeys(_functions("unbind"), _unbound),
    **dict.fromkeys(_methods("__iter__"), _iterated),
    **dict.fromkeys(
        _methods("to type type_as float double half bfloat16 long int bool cpu cuda"), _converted
    ),
}
_FREE = {
    *_methods("shape dtype device ndim layout itemsize nbytes requires_grad grad grad_fn is_leaf"),
    *_methods("is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested names"),
    *_methods("dim ndimension size nelement element_size get_device __len__ __hash__"),
    *_functions("numel is_floating_point is_complex is_signed is_inference"),
}
# They look at nothing but the dtype and device of a tensor they are given.
_OF_DTYPE_AND_DEVICE = set(_methods("to type_as new_tensor new_zeros new_ones new_full new_empty"))
_IN_PLACE_OPERATORS = {
    "__setitem__",
    "__set__",
    *(f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor".split()),
    *("__ilshift__", "__irshift__", "__idiv__", "__imatmul__"),
}


# -- what a metric looks at ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reads:
    """The logits that a metric asked for: all of ``rows`` x ``columns``, the union of its asks.

    Attributes:
        rows: ``example * n_pos + pos``, ascending.
        columns: Token ids, ascending; None is the whole vocabulary.
    """

    rows: Int[Tensor, " row"]
    columns: Int[Tensor, " column"] | None


class RecordingSource(LogitSource):
    """Answers every ask with zeros and remembers what was asked.

    Args:
        d_vocab: Columns of the whole vocabulary.
        dtype, device: Of the logits it stands for.
    """

    def __init__(self, d_vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._d_vocab = d_vocab
        self._rows: list[Tensor] = []
        # None once the whole vocabulary was asked for.
        self._columns: list[Tensor] | None = []

    def block(
        self, rows: Int[Tensor, " row"], columns: Int[Tensor, " column"] | None
    ) -> Float[Tensor, "row column"]:
        """Zeros."""
        self._rows.append(rows)
        if columns is None:
            self._columns = None
        elif self._columns is not None:
            self._columns.append(columns)
        n_columns = self._d_vocab if columns is None else columns.numel()
        return torch.zeros(rows.numel(), n_columns, dtype=self.dtype, device=self.device)

    @property
    def reads(self) -> Reads:
        """What was asked so far."""
        columns = None if self._columns is None else _union(self._columns)
        if columns is not None and columns.numel() == self._d_vocab:
            columns = None
        return Reads(_union(self._rows), columns)


def _union(ids: list[Tensor]) -> Int[Tensor, " id"]:
    return torch.unique(torch.cat([_ids(0), *ids]))


def reads_of(
    metric: Callable[[Any], Any],
    batch: int,
    n_pos: int,
    d_vocab: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Reads | None, Any]:
    """What a metric looks at, found by calling it once on logits that are all zero.

    A prediction: a metric may look elsewhere when it sees other logits.

    Args:
        metric: A function of logits ``[batch, pos, d_vocab]``.

    Returns:
        The reads and the metric's value, computed; or None and the exception it raised.
    """
    source = RecordingSource(d_vocab, dtype, device)
    try:
        value = plain(metric(LazyLogits(source, batch, n_pos, d_vocab)))
    except Exception as error:
        return None, error
    return source.reads, value
