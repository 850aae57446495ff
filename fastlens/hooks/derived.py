"""Cache entries that are computed when they are read, from tensors that the cache holds anyway."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from fastlens.errors import EditedError
from fastlens.ops.outlier_rows import Int8OutlierRows

# What an entry is computed from, what is stored at a place, and what may stand in a cache.
Source: TypeAlias = "Tensor | Derived"
Stored: TypeAlias = Tensor | Int8OutlierRows
Entry: TypeAlias = "Tensor | Derived | Int8OutlierRows"
Rows: TypeAlias = Sequence[int] | Tensor | None
# Some heads and query rows of an entry: formula(*sources, heads, rows).
PartFormula: TypeAlias = Callable[..., Tensor]


class Derived:
    """One entry, as the formula that gives it and the tensors that the formula reads.

    The value is the one the forward had: sources are captured tensors, never weights, and a source
    that was written to since is an error at the first read, not a wrong value.

    Args:
        name: Of the entry, for errors.
        formula: ``formula(*sources)``; must give the value that passed the hook point.
        sources: By name; another `Derived` is computed on the way.
        shape, dtype: Of the value.
        part: ``part(*sources, heads, rows)`` gives some heads and query rows alone.
    """

    how = "computed when read"

    def __init__(
        self,
        name: str,
        formula: Callable[..., Tensor],
        sources: Mapping[str, Source],
        shape: Sequence[int],
        dtype: torch.dtype,
        part: PartFormula | None = None,
    ):
        self.name = name
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._formula = formula
        self._sources = dict(sources)
        self._versions = {
            name: source._version for name, source in sources.items() if isinstance(source, Tensor)
        }
        self._part = part
        # The value and its version when it was computed.
        self._read: tuple[Tensor, int] | None = None

    def read(self) -> Tensor:
        """The value, kept from now on; the sources are let go."""
        if self._read is None:
            value = self.compute()
            # In this order: another thread may be reading too.
            self._read = value, value._version
            self._sources, self._part = {}, None
        return self._read[0]

    def compute(self) -> Tensor:
        """The value, not kept.

        Raises: EditedError if a source, or the value itself, was written to since.
        """
        sources = self._sources
        if self._read is not None:
            value, version = self._read
            if value._version != version:
                raise self._edited(self.name)
            return value
        self._check(sources)
        with _as_in_a_plain_run():
            found = [s if isinstance(s, Tensor) else s.compute() for s in sources.values()]
            return self._formula(*found)

    def read_part(self, heads: Sequence[int] | None, rows: Rows) -> Tensor | None:
        """Some heads and query rows, without the rest; None if only the whole can be computed."""
        part, sources = self._part, self._sources
        if part is None or self._read is not None:
            return None
        self._check(sources)
        with _as_in_a_plain_run():
            return part(*sources.values(), heads, rows)

    def then(self, change: Callable[[Tensor], Tensor], shape: Sequence[int]) -> "Derived":
        """The entry of that shape that ``change`` makes of this one's value."""
        return Derived(self.name, change, {self.name: self}, shape, self.dtype)

    def on(
        self, change: Callable[[Source], Source], shape: Sequence[int] | None = None
    ) -> "Derived":
        """The same entry of changed sources, such as those moved to another device.

        Args:
            shape: Of the value then, if it is another.

        Raises: EditedError if a source was written to since it was captured.
        """
        shape = self.shape if shape is None else shape
        sources = self._sources
        if self._read is not None:
            made: dict[str, Source] = {self.name: change(self.compute())}
            return Derived(self.name, _as_it_is, made, shape, self.dtype)
        self._check(sources)
        made = {name: change(source) for name, source in sources.items()}
        return Derived(self.name, self._formula, made, shape, self.dtype, self._part)

    def held(self) -> Iterator[Tensor]:
        """Every tensor that this entry keeps alive."""
        if self._read is not None:
            yield self._read[0]
        for source in self._sources.values():
            yield from [source] if isinstance(source, Tensor) else source.held()

    def _check(self, sources: Mapping[str, Source]) -> None:
        for name, source in sources.items():
            if isinstance(source, Tensor) and source._version != self._versions[name]:
                raise self._edited(name)

    def _edited(self, name: str) -> EditedError:
        return EditedError(
            f"{self.name!r} is computed when it is first read, and {name!r}, which it is computed "
            f"from, was edited since the run. Read {self.name!r} before you edit, or pass "
            f"lazy=False to run_with_cache, which stores every activation."
        )


@contextlib.contextmanager
def _as_in_a_plain_run() -> Iterator[None]:
    """Whatever surrounds the reader: no graph, no autocast, and tensors like any other."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _as_it_is(value: Tensor) -> Tensor:
    return value


class CacheDict(dict[str, Tensor]):
    """A dict of activations in which some are computed, and some unpacked, when they are read.

    Whatever reads a value (``d[name]``, ``get``, ``values``, ``items``, ``dict(d)``, pickling) gets
    a tensor. `entry` and `entries` show what is there without computing. What was computed once
    stays; packed entries are unpacked at every read, into a new tensor.

    A subclass may put elsewhere what a run captures (``run_with_cache(into=...)``): it overrides
    `capture`, through which every activation comes, and how entries are read back.

    Attributes:
        repeated: A place was captured a second time, as when a hook runs the model: what stands
            under a name may be of another forward.
        takes_derived: Entries that are computed from others when they are read may be `put` here.
            Where this is False a run stores every activation through `capture`, and never calls
            `put` or `entry`.
    """

    repeated = False
    takes_derived = True

    def capture(self, name: str, value: Stored) -> None:
        """Put what passed a place there. Called once per place and run, in the run's order.

        Args:
            name: The hook name; of a gradient with ``_grad`` at the end; of one call of several
                (`HookedModule`) with its number.
            value: Final: sliced, cast or packed, without the batch axis if that goes, and on the
                run's ``device=``. A tensor that nothing will write to before this returns; where
                no ``dtype=`` was asked for it may share memory with the run, so a subclass that
                works on it later copies it. The same object comes again under another name where
                one activation passes two places (``resid_post`` of a layer is ``resid_pre`` of
                the next).

        What this raises ends the run and reaches the caller.
        """
        self.repeated = self.repeated or name in self
        self.put(name, value)

    def entry(self, name: str) -> Entry:
        """What stands there: a tensor, a packed one, or the `Derived` that will give it."""
        return super().__getitem__(name)

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Pairs of name and `entry`."""
        return iter(super().items())

    def put(self, name: str, entry: Entry) -> None:
        """Put a tensor, a packed one or a `Derived` there."""
        super().__setitem__(name, entry)  # type: ignore[assignment]

    def __getitem__(self, name: str) -> Tensor:
        found: Entry = super().__getitem__(name)
        if isinstance(found, Derived):
            found = found.read()
            super().__setitem__(name, found)
        return found.read() if isinstance(found, Int8OutlierRows) else found

    # With an __iter__ of its own a dict is copied by reading its values one by one.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:  # type: ignore[override]
        """The activation, or ``default``."""
        if name not in self:
            return default
        return self[name]

    def pop(self, name: str, *default: Any) -> Any:  # type: ignore[override]
        """The activation, taken out."""
        if name in self:
            value = self[name]
            del self[name]
            return value
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Tensor]:
        """The last name and its activation, taken out."""
        if not self:
            return super().popitem()
        name = next(reversed(self))
        return name, self.pop(name)

    def setdefault(self, name: str, default: Any = None) -> Any:  # type: ignore[override]
        """The activation, put there first if it is missing."""
        if name not in self:
            self[name] = default
        return self[name]

    def values(self) -> Any:
        """The activations."""
        return ValuesView(cast(Mapping[str, Tensor], self))

    def items(self) -> Any:
        """Pairs of name and activation."""
        return ItemsView(cast(Mapping[str, Tensor], self))

    def copy(self) -> "CacheDict":
        """Another dict of the same entries, computed or not."""
        made = CacheDict()
        for name, entry in self.entries():
            made.put(name, entry)
        return made

    def __or__(self, other: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return dict(self) | other

    def __ror__(self, other: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return other | dict(self)

    def __repr__(self) -> str:
        return repr(dict(self))

    # Neither formulas nor what they hold belong into a file. torch.load reads an OrderedDict.
    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, self._computed()

    def _computed(self) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self.entries():
            if isinstance(entry, Derived):
                yield name, entry.compute()
            else:
                yield name, entry.read() if isinstance(entry, Int8OutlierRows) else entry
