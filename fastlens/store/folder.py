"""`Store`: an append-only folder of activations, in shards that are whole or named as torn."""

import contextlib
import json
import os
import re
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from torch import Tensor

from fastlens.errors import SourceError, did_you_mean
from fastlens.ops.outlier_rows import Int8OutlierRows
from fastlens.store.files import FolderLock, fault, flush_folder, make_folder, write_parts
from fastlens.store.shard import Shard, write_shard

FORMAT = "fastlens.store"
VERSION = 1
ABOUT_NAME = "store.json"
INDEX_NAME = "index.jsonl"
SHARDS_NAME = "shards"
SHARD = re.compile(r"[0-9]{6,}\.safetensors")
# What stands between an entry's name and the name of one of its four tensors.
PART = "::"

Entry: TypeAlias = Tensor | Int8OutlierRows


class Store:
    """A folder of activations that only grows.

    >>> with Store.create("acts", key={"model": "toy-induction"}) as store:
    ...     store.append({"blocks.0.hook_resid_post": torch.zeros(2, 5, 8)})
    >>> Store.open("acts").read("blocks.0.hook_resid_post", part=[None, slice(0, 2)]).shape
    torch.Size([2, 2, 8])

    ``store.json`` holds the key, which says what the store is of. ``shards/000000.safetensors`` and
    so on are ordinary safetensors files. ``index.jsonl`` has a line for each shard, in order, with
    places, sizes and digests, and a checksum of the line itself. A shard is written beside its
    place, flushed to disk, renamed, and then its line is appended and flushed: a kill or a full
    disk at any moment costs the shard being written and no other.

    What is checked when: opening compares the key, every line's checksum and every file's size;
    the first read of a shard its header; every read whether the file is still the same one; bytes
    of tensors are compared with their digests by `verify` only, as a partial read cannot.

    One writer at a time: the folder is locked until `close`; readers need no lock and see what was
    appended before they opened it.

    Attributes:
        path: The folder.
        key: What the store is of, as JSON gives it back.
        shards: In the order in which they were appended, torn ones too.
        torn: A sentence for each torn shard by its number; reading it raises, the others are read.
        cut_off: A sentence if the index ends in half a line, else empty.
    """

    path: Path
    key: dict[str, Any]
    shards: list[Shard]
    torn: dict[int, str]
    cut_off: str

    def __init__(self, path: Path, key: dict[str, Any], lock: FolderLock | None) -> None:
        """Use `open` or `create`, which check what is there first."""
        self.path = path
        self.key = key
        self.shards = []
        self.torn = {}
        self.cut_off = ""
        self._lock = lock
        if lock is not None:
            weakref.finalize(self, lock.release)
        self._size = self._read_index()
        for number, shard in enumerate(self.shards):
            try:
                shard.check_size()
            except SourceError as error:
                self.torn[number] = str(error)

    @classmethod
    def open(cls, folder: str | Path) -> "Store":
        """For reading.

        Raises: SourceError if this is no store, or its index is damaged.
        """
        path = Path(folder).expanduser()
        return cls(path, _read_about(path / ABOUT_NAME)["key"], None)

    @classmethod
    def create(cls, folder: str | Path, key: Mapping[str, Any] | None = None) -> "Store":
        """For appending: a new store in a new or empty folder, or the one there of the same key.

        What a killed writer left half-written is removed.

        Args:
            key: As JSON can hold it.

        Raises: SourceError if the folder holds something else, a store of another key (saying what
            differs), is in use by another process, or cannot be written to.
        """
        path = Path(folder).expanduser()
        wanted = json.loads(json.dumps(dict(key or {})))
        make_folder(path)
        _check_ours(path)
        lock = FolderLock(path, "capture")
        try:
            if (path / ABOUT_NAME).exists():
                _check_key(path, _read_about(path / ABOUT_NAME)["key"], wanted)
            else:
                make_folder(path / SHARDS_NAME)
                about = {"format": FORMAT, "version": VERSION, "key": wanted}
                write_parts(path / ABOUT_NAME, [json.dumps(about).encode() + b"\n"])
            store = cls(path, wanted, lock)
        except BaseException:
            lock.release()
            raise
        store._clear()
        return store

    def close(self) -> None:
        """Let other processes append. Reading still works."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.shards)

    def append(self, entries: Mapping[str, Entry], about: Mapping[str, Any] | None = None) -> int:
        """Put activations into a new shard; on return they are on disk.

        Args:
            entries: Tensors, or int8 rows with outliers, which stay packed.
            about: Kept with the shard, as JSON can hold it.

        Returns: the shard's number.

        Raises: SourceError if it cannot be written; what was appended before is kept.
        """
        number = len(self.shards)
        shard = self._write(number, entries, about or {})
        line = json.dumps(shard.record(), separators=(",", ":")).encode()
        self._append_line(line + f" {zlib.crc32(line):08x}\n".encode())
        self.shards.append(shard)
        return number

    def restore(self, number: int, entries: Mapping[str, Entry], about: Mapping[str, Any]) -> None:
        """Write a torn shard again.

        Raises: SourceError if these are other bytes than those that were lost.
        """
        before = self.shards[number]
        after = self._write(number, entries, about)
        if after.record() != before.record():
            raise SourceError(
                f"{before.path} was torn, and made again it differs from what the index says of "
                f"it: another machine, library or number of threads? Capture into another folder."
            )
        self.shards[number] = after
        del self.torn[number]

    def names(self) -> list[str]:
        """Entries of all shards, in the order in which they were first appended."""
        return list(
            dict.fromkeys(entry_name(name) for shard in self.shards for name in shard.places)
        )

    def where(self, name: str) -> list[int]:
        """Numbers of the shards that have this entry.

        Raises: SourceError, with near names, if none has.
        """
        found = [i for i, shard in enumerate(self.shards) if name in _entries(shard)]
        if not found:
            names = self.names()
            raise SourceError(
                f"no {name!r} in the store {self.path}, which has {', '.join(names) or 'nothing'}."
                f"{did_you_mean(name, names)}"
            )
        return found

    def read(
        self,
        name: str,
        shard: int | None = None,
        part: Sequence[slice | Sequence[int] | None] = (),
    ) -> Tensor:
        """An entry, or part of it, as a new tensor; only bytes of that part are read.

        Args:
            shard: Its number; None for the last that has the entry.
            part: For each axis: a slice, indices, or None for all. Int8 rows are read whole.

        Raises: SourceError if the shard is torn, changed or cannot be read; the others still can.
        """
        number = self.where(name)[-1] if shard is None else shard
        found = self.sound(number)
        if name in found.places:
            return found.read(name, part)
        if part:
            raise SourceError(f"{name!r} is stored as int8 rows: read it whole, then slice it.")
        return self._packed(found, name, found.read).read()

    def mapped(self, name: str, shard: int | None = None) -> Entry:
        """An entry in memory-mapped pages, as `Shard.mapped`; int8 rows stay packed."""
        number = self.where(name)[-1] if shard is None else shard
        found = self.sound(number)
        return (
            found.mapped(name) if name in found.places else self._packed(found, name, found.mapped)
        )

    def verify(self) -> list[str]:
        """A sentence for each fault; none if every byte is as it was written. Reads everything."""
        faults = [self.cut_off] if self.cut_off else []
        return faults + [fault for shard in self.shards for fault in shard.verify()]

    # -- inside ----------------------------------------------------------------------------

    def _packed(self, shard: Shard, name: str, read: Any) -> Int8OutlierRows:
        return Int8OutlierRows(*(read(name + PART + field) for field in Int8OutlierRows._fields))

    def sound(self, number: int) -> Shard:
        """A shard that is not torn.

        Raises: SourceError for one that is.
        """
        if number in self.torn:
            raise SourceError(f"{self.torn[number]} The other shards can be read.")
        return self.shards[number]

    def _write(self, number: int, entries: Mapping[str, Entry], about: Mapping[str, Any]) -> Shard:
        if self._lock is None or not self._lock.is_held:
            raise SourceError(f"the store {self.path} is not open for appending: use Store.create.")
        tensors: dict[str, Tensor] = {}
        for name, entry in entries.items():
            if isinstance(entry, Int8OutlierRows):
                tensors |= {f"{name}{PART}{f}": t for f, t in entry._asdict().items()}
            else:
                tensors[name] = entry
        path = self.path / SHARDS_NAME / f"{number:06d}.safetensors"
        try:
            return write_shard(path, tensors, json.loads(json.dumps(dict(about))))
        except SourceError as error:
            raise SourceError(
                f"{error} The {len(self.shards)} shards before it are kept."
            ) from error.__cause__

    def _append_line(self, line: bytes) -> None:
        path = self.path / INDEX_NAME
        try:
            with path.open("ab") as file:
                file.truncate(self._size)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # Half a line is nobody's; the next writer removes it if this cannot.
            with contextlib.suppress(OSError), path.open("ab") as file:
                file.truncate(self._size)
            raise fault("write", path, error) from error
        if not self._size:
            flush_folder(self.path)
        self._size += len(line)

    def _read_index(self) -> int:
        """Fill ``shards``. Returns the length of the index's whole lines."""
        path = self.path / INDEX_NAME
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise fault("read", path, error) from error
        lines = data.split(b"\n")
        done = 0
        for i, line in enumerate(lines[:-1]):
            record = _checked(line)
            if record is None and any(lines[i + 1 :]):
                raise SourceError(
                    f"{path} is damaged in line {i + 1}, with whole lines behind it: shard "
                    f"{i:06d} and those after it cannot be told apart. Restore the file."
                )
            if record is None:
                break
            self.shards.append(Shard.of_record(self.path / SHARDS_NAME, record))
            done += len(line) + 1
        if done < len(data):
            self.cut_off = (
                f"{path} ends in a torn line: shard {len(self.shards):06d} was being appended when "
                f"its writer stopped. The {len(self.shards)} before it are whole."
            )
        return done

    def _clear(self) -> None:
        """Remove what a killed writer left: temporary files, and a shard without its line."""
        ours = {shard.path.name for shard in self.shards}
        folder = self.path / SHARDS_NAME
        make_folder(folder)
        for path in [*folder.iterdir(), *self.path.glob(".*.tmp")]:
            is_left = SHARD.fullmatch(path.name) and path.name not in ours
            if is_left or (path.name.startswith(".") and path.name.endswith(".tmp")):
                with contextlib.suppress(OSError):
                    path.unlink()


def entry_name(tensor: str) -> str:
    """The entry that a tensor of a shard belongs to."""
    return tensor.partition(PART)[0]


def _entries(shard: Shard) -> Iterator[str]:
    return map(entry_name, shard.places)


def _checked(line: bytes) -> dict[str, Any] | None:
    text, _, crc = line.rpartition(b" ")
    if crc != f"{zlib.crc32(text):08x}".encode():
        return None
    return json.loads(text)


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError(
            f"{path.parent} is no store of activations: it has no {path.name}. Make one with "
            f"run_with_cache(store=...), fastlens.store.capture_text or `fastlens capture`."
        ) from error
    except OSError as error:
        raise fault("read", path, error) from error
    except ValueError as error:
        raise SourceError(f"{path} is torn or is not JSON: {error}.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise SourceError(f"{path} was not written by a store of fastlens.")
    if about.get("version") != VERSION:
        raise SourceError(f"{path} is of version {about.get('version')}; this reads {VERSION}.")
    return about


def _check_ours(path: Path) -> None:
    """Refuse a folder that is somebody's; hidden files are nobody's work."""
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    # A writer killed before store.json was renamed leaves the empty folder of shards.
    if ABOUT_NAME not in names and names and names != [SHARDS_NAME]:
        shown = ", ".join(map(repr, names[:4]))
        raise SourceError(
            f"the folder {path} holds other things than a store: {shown}. Give a new or empty one."
        )


def _check_key(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    different = [
        f"{name}: {there.get(name, 'nothing')!r} there, {here.get(name, 'nothing')!r} here"
        for name in dict.fromkeys([*here, *there])
        if json.dumps(there.get(name)) != json.dumps(here.get(name))
    ]
    if different:
        raise SourceError(
            f"the folder {path} holds another store: {'; '.join(different)}. Give another folder, "
            f"or delete this one to start anew."
        )
