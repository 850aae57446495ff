"""The logits that a sweep hands to a metric: computed where the metric looks, and nowhere else.

`LazyLogits` is that tensor and `LogitSource` what it asks; `reads_of` finds out beforehand which
logits a metric looks at. Where logits come from is not known here.
"""

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.errors import MetricError
from fastlens.patching.logit_index import LogitIndex, all_logits

# Where the logits were moved and what they were cast to, one after the other.
_Casts: TypeAlias = tuple[tuple[torch.device, torch.dtype], ...]


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
    _where: LogitIndex
    _casts: _Casts
    _memory: "_Memory"
    _plain: Tensor | None

    def __new__(cls, source: LogitSource, batch: int, n_pos: int, d_vocab: int) -> "LazyLogits":
        """All logits of a run.

        Args:
            source: Computes them; its rows are ``example * n_pos + pos``.
        """
        return _stand_in(source, all_logits(batch, n_pos, d_vocab), (), _Memory(is_copy=False))

    def full(self) -> Tensor:
        """All that this tensor stands for, as a plain tensor; computed at the first call."""
        self._memory.check(self._plain)
        if self._plain is None:
            self._plain = self._computed(self._where)
            self._memory.hand_out(self._plain)
        return self._plain

    def __getitem__(self, index: Any) -> Tensor:
        """As torch's, computing no logit that the index does not name."""
        return self._derived(LogitIndex.indexed, operator.getitem, (index,), {})

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
        how: Callable[..., LogitIndex],
        func: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """``func(self, *args, **kwargs)``, where ``how`` knows which logits that takes."""
        args, kwargs = plain(args), plain(kwargs)
        if self._plain is not None:
            return func(self.full(), *args, **kwargs)
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

    def _computed(self, where: LogitIndex) -> Tensor:
        if 0 in where.shape:
            return self._scalar().new_empty(where.shape)
        ask = where.ask
        values = ask.arranged(self._source.block(ask.rows, ask.columns)).reshape(where.shape)
        for device, dtype in self._casts:
            values = values.to(device, dtype)
        return values

    def _scalar(self) -> Tensor:
        """A number of its dtype on its device, where nothing else about it matters."""
        device, dtype = _device_and_dtype(self._source, self._casts)
        return torch.zeros((), dtype=dtype, device=device)

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


def _device_and_dtype(source: LogitSource, casts: _Casts) -> tuple[torch.device, torch.dtype]:
    return casts[-1] if casts else (source.device, source.dtype)


def _stand_in(
    source: LogitSource, where: LogitIndex, casts: _Casts, memory: "_Memory"
) -> LazyLogits:
    device, dtype = _device_and_dtype(source, casts)
    lazy = Tensor._make_wrapper_subclass(LazyLogits, where.shape, dtype=dtype, device=device)
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
        self.handed_out = [one for one in self.handed_out if one[0]() is not None]
        for reference, version in self.handed_out:
            part = reference()
            if part is None or part._version == version:
                continue
            if own is None or not self.is_copy or part is not _base(own):
                raise _impure("wrote into the logits through a view, and then read them again")


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _writes(name: str) -> bool:
    return name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def _impure(did: str) -> MetricError:
    return MetricError(
        f"the metric {did}. It must leave them as they are: they are computed only where it looks. "
        f"Write into a copy: x = logits[:, -1].clone()."
    )


# -- the functions of torch that need not compute everything -------------------------------------


def _deriving(how: Callable[..., LogitIndex]) -> Callable[..., Tensor]:
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
    return tuple(logits._derived(LogitIndex.viewed, Tensor.select, (dim, i), {}) for i in each)


def _iterated(func: Callable[..., Any], logits: LazyLogits) -> Any:
    return iter(_unbound(Tensor.unbind, logits))


def _converted(func: Callable[..., Any], logits: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    before = logits._scalar()
    after = func(before, *args, **kwargs)
    if after is before:
        return logits
    if not isinstance(after, Tensor):
        return after
    if logits._plain is not None:
        return func(logits.full(), *args, **kwargs)
    logits._memory.check()
    casts = (*logits._casts, (after.device, after.dtype))
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


_LAZY: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        _functions("select narrow squeeze unsqueeze detach"), _deriving(LogitIndex.viewed)
    ),
    **dict.fromkeys(_methods("data"), _deriving(LogitIndex.viewed)),
    **dict.fromkeys(_methods("__getitem__"), _deriving(LogitIndex.indexed)),
    **dict.fromkeys(_functions("gather"), _deriving(LogitIndex.gathered)),
    **dict.fromkeys(_functions("index_select"), _deriving(LogitIndex.selected)),
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
    return torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *ids]))


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
