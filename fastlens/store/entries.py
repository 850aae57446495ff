"""Cache entries that lie on disk: what `ActivationCache.open` and ``store=`` put into a cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.hooks.derived import CacheDict, Derived, Source
from fastlens.ops.outlier_rows import Int8OutlierRows
from fastlens.store.folder import PART, Entry, Store


class Stored(Derived):
    """An entry that is read from its shard when asked for; it holds no memory of its own.

    Pages of the file are mapped once and come and go as the system likes. In-place edits stay in
    this process.

    Args:
        store, shard, name: Which.
    """

    how = "on disk"

    def __init__(self, store: Store, shard: int, name: str):
        places = store.shards[shard].places
        if name in places:
            shape, dtype = places[name].shape, places[name].dtype
        else:
            shape = places[f"{name}{PART}values"].shape
            dtype = places[f"{name}{PART}exact"].dtype
        super().__init__(name, partial(store.mapped, name, shard), {}, shape, dtype)  # type: ignore[arg-type]
        self._map: Callable[[], Entry] = partial(store.mapped, name, shard)
        self._mapped: Entry | None = None

    @property
    def entry(self) -> Entry:
        """The tensor, or int8 rows still packed, in mapped pages.

        Raises: SourceError if the shard is torn or cannot be read.
        """
        if self._mapped is None:
            self._mapped = self._map()
        return self._mapped

    def read(self) -> Tensor:
        """The activation; int8 rows are unpacked anew at each read."""
        return self.compute()

    def compute(self) -> Tensor:
        """The activation; int8 rows are unpacked anew at each read."""
        entry = self.entry
        return entry.read() if isinstance(entry, Int8OutlierRows) else entry

    def read_part(self, heads: Any, rows: Any) -> Tensor | None:
        """None: indexing what is mapped reads only those bytes."""
        return None

    def on(self, change: Callable[[Source], Source], shape: Sequence[int] | None = None) -> Any:
        """What the change makes of the activation, now."""
        return change(self.compute())

    def held(self) -> Iterator[Tensor]:
        """Nothing."""
        return iter(())


class StoredDict(CacheDict):
    """Activations in a store: reading one keeps nothing here.

    Args:
        store: Open for reading, or for appending if the dict is to be filled.
    """

    takes_derived = False

    def __init__(self, store: Store):
        super().__init__()
        self.store = store

    @classmethod
    def of(cls, store: Store) -> "StoredDict":
        """All entries of a store that holds each of them once.

        Raises: ShapeError if it holds a dataset, in which an entry has many shards.
        """
        made = cls(store)
        for number, shard in enumerate(store.shards):
            for name in dict.fromkeys(tensor.partition(PART)[0] for tensor in shard.places):
                if name in made:
                    raise ShapeError(
                        f"the store {store.path} has {name!r} in shards {store.where(name)}: it is "
                        f"a dataset. Read it with fastlens.store.Store or ActivationLoader, or "
                        f"give the number of one shard."
                    )
                made.put(name, Stored(store, number, name))
        return made

    @classmethod
    def of_shard(cls, store: Store, number: int) -> "StoredDict":
        """Entries of one shard."""
        made = cls(store)
        for name in dict.fromkeys(t.partition(PART)[0] for t in store.shards[number].places):
            made.put(name, Stored(store, number, name))
        return made

    def capture(self, name: str, value: Entry) -> None:
        """Append what passed a place to the store, as a shard of its own.

        Raises: SourceError if it cannot be written; ShapeError if the place passed before.
        """
        if name in self:
            raise ShapeError(
                f"{name!r} passed twice in one run, and a store takes it once: leave it out of "
                f"names_filter, or run without store=."
            )
        number = self.store.append({name: value})
        self.put(name, Stored(self.store, number, name))

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entry(name)
        return entry.compute() if isinstance(entry, Derived) else super().__getitem__(name)

    def copy(self) -> CacheDict:
        """Another dict of the same entries."""
        made = StoredDict(self.store)
        for name, entry in self.entries():
            made.put(name, entry)
        return made


def open_entries(
    folder: str | Path, shard: int | None = None
) -> tuple[StoredDict, Mapping[str, Any]]:
    """The entries of a store, or of one of its shards, and the key it was made with."""
    store = Store.open(folder)
    if shard is None:
        return StoredDict.of(store), store.key
    if not 0 <= shard < len(store):
        raise ShapeError(f"shard {shard} of {len(store)} in {store.path}: counted from 0.")
    return StoredDict.of_shard(store, shard), store.key


def fresh(folder: str | Path, key: Mapping[str, Any]) -> StoredDict:
    """A dict that fills a new store.

    Raises: ShapeError if the folder holds one already: a second run's entries would be mixed in.
    """
    store = Store.create(folder, key)
    if len(store):
        store.close()
        raise ShapeError(
            f"the folder {store.path} holds {len(store)} activations already. Give another folder "
            f"or delete this one; ActivationCache.open reads it."
        )
    return StoredDict(store)
