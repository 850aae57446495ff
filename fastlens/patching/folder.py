"""`SweepFolder`: where a long sweep keeps its finished chunks, so that a killed one can go on."""

import contextlib
import hashlib
import json
import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from fastlens.errors import SourceError
from fastlens.scores_files import JSON_NAME, TENSORS_NAME, writable_folder, write_whole
from fastlens.store.files import FolderLock, advice, flush_folder, make_folder

FORMAT = "fastlens.sweep"
FORMAT_VERSION = 1
PLAN_NAME = "plan.json"
CHUNKS_NAME = "chunks"
SHARD = re.compile(r"([0-9]{5,})\.safetensors")
# What `write_whole` and `writable_folder` leave behind when the process is killed inside them.
WRITTEN = "|".join([*map(re.escape, (PLAN_NAME, JSON_NAME, TENSORS_NAME)), SHARD.pattern])
TEMPORARY = re.compile(rf"\.(({WRITTEN})\.|writable-)[0-9]+")
# The key of a shard's one line of metadata: chunk number, sweep, SHA-256 of the file.
METADATA_KEY = "fastlens.chunk"
NO_DIGEST = "0" * 64
SHOWN_DIFFERENCES = 4


class SweepFolder:
    """A folder that takes a sweep's chunks one by one and knows which of them are whole.

    >>> with SweepFolder.open("sweep", key={"metric": "KL"}, layout={"chunks": [[0, 1], [2]]}) as f:
    ...     for chunk in set(range(2)) - set(f.finished()):
    ...         f.write(chunk, {"values": torch.zeros(2)})
    ...     values = f.read(0)["values"]

    ``plan.json`` holds the key, which says what the sweep is, and the layout, which says how it was
    cut up; ``chunks/00000.safetensors`` and so on hold results. There is no index: what is listed
    and passes its checksum is finished. A file is written beside its place, flushed to disk and
    renamed, so a kill or a full disk at any moment costs the chunk being written and no other.

    One process at a time: the folder is locked until `close`, the end of the ``with`` block, or the
    death of the process. Where the system has no ``flock`` (Windows, some network disks) it is not.

    Attributes:
        path: The folder.
        layout: The stored layout, as JSON gives it back; that of the first run, not of this one.
        torn: What the last `finished` found unfit, a sentence each; these chunks are to be redone.
    """

    path: Path
    layout: dict[str, Any]
    torn: list[str]

    def __init__(self, path: Path, layout: dict[str, Any], sweep: str, lock: FolderLock) -> None:
        """Use `open`, which checks what is there first."""
        self.path = path
        self.layout = layout
        self.torn = []
        self._sweep = sweep
        self._lock = lock
        weakref.finalize(self, lock.release)

    @classmethod
    def open(
        cls, folder: str | Path, key: Mapping[str, Any], layout: Mapping[str, Any]
    ) -> "SweepFolder":
        """Begin a sweep in a new or empty folder, or go on with the same one.

        Args:
            folder: Made if needed.
            key: What the sweep is, as JSON can hold it; a folder with another key is refused.
            layout: How this run would cut it up, as JSON can hold it; kept if the sweep is new.

        Raises: SourceError if the folder holds another sweep or something else, is in use by
            another process, or cannot be written to.
        """
        path = Path(folder).expanduser()
        wanted, cut = _as_json(key), _as_json(layout)
        # Before anything is put into a folder that may be someone else's.
        _check_ours(path)
        make_folder(path)
        lock = FolderLock(path, "sweep")
        try:
            writable_folder(path)
            _check_ours(path)
            _clear_temporary(path)
            if (path / PLAN_NAME).exists():
                cut, sweep = _stored_layout(path, wanted)
            else:
                sweep = _write_plan(path, wanted, cut)
            make_folder(path / CHUNKS_NAME)
            return cls(path, cut, sweep, lock)
        except BaseException:
            lock.release()
            raise

    def close(self) -> None:
        """Give the folder free for other processes. Reading still works, writing does not."""
        self._lock.release()

    def __enter__(self) -> "SweepFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def finished(self) -> list[int]:
        """Numbers of the chunks whose shard is whole, in order; the others go to ``torn``.

        Cost: reads every shard.
        """
        self.torn = []
        found = []
        for name in sorted(_listing(self.path / CHUNKS_NAME)):
            if not name.endswith(".safetensors") or name.startswith("."):
                continue
            named = SHARD.fullmatch(name)
            chunk = int(named[1]) if named else 0
            if name != _shard_name(chunk):
                self.torn.append(f"{self.path / CHUNKS_NAME / name} is no chunk's name.")
                continue
            try:
                self._bytes(chunk)
                found.append(chunk)
            except SourceError as error:
                self.torn.append(str(error))
        return sorted(found)

    def read(self, chunk: int) -> dict[str, Tensor]:
        """The tensors of a finished chunk, on the CPU.

        Raises: SourceError if its shard is missing, torn or another sweep's.
        """
        return load_tensors(self._bytes(chunk))

    def write(self, chunk: int, tensors: Mapping[str, Tensor]) -> None:
        """Put down a finished chunk; on return it is on disk. An older shard is replaced.

        The same tensors give the same bytes.

        Raises: SourceError if it cannot be written, or if the folder was closed.
        """
        path = self.path / CHUNKS_NAME / _shard_name(chunk)
        if not self._lock.is_held:
            raise SourceError(f"cannot write {path}: the folder was closed. Open it again.")
        data = _dump(path, tensors, f"{chunk} {self._sweep} ")
        try:
            _write(path, data)
        except SourceError as error:
            kept = "The finished chunks are kept: run the same sweep again and it goes on from them"
            raise SourceError(f"{error} {kept}.") from error.__cause__

    def clear_temporary(self) -> None:
        """Remove what killed runs left half-written; `open` does it."""
        _clear_temporary(self.path)

    def _bytes(self, chunk: int) -> bytes:
        path = self.path / CHUNKS_NAME / _shard_name(chunk)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror or error}.") from error
        about = _checked_metadata(data)
        if about is None:
            raise SourceError(f"{path} is torn: it was cut off or changed since it was written.")
        if about != [str(chunk), self._sweep]:
            raise SourceError(f"{path} is whole, but was written by another sweep or chunk.")
        return data


# -- shards --------------------------------------------------------------------------------------


def _shard_name(chunk: int) -> str:
    if chunk < 0:
        raise SourceError(f"chunks are numbered from 0; got {chunk}.")
    return f"{chunk:05d}.safetensors"


def _dump(path: Path, tensors: Mapping[str, Tensor], about: str) -> bytes:
    """The file's bytes; its digest is that of the file with zeros where the digest stands."""
    # Copies: safetensors refuses tensors that share memory or have strides, and writes those that
    # are conjugated lazily as if they were not.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        data = dump_tensors(plain, {METADATA_KEY: about + NO_DIGEST})
        # Some types can be written and not read.
        load_tensors(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        found = ", ".join(f"{name!r} ({tensor.dtype})" for name, tensor in tensors.items())
        raise SourceError(
            f"cannot write {path}: safetensors does not take one of {found}: {error}."
        ) from error
    # The metadata comes first in the file, so the first such zeros are those of the digest.
    return data.replace(NO_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def _checked_metadata(data: bytes) -> list[str] | None:
    """The words before the digest, or None if any byte is not as it was written."""
    size = int.from_bytes(data[:8], "little")
    try:
        *about, digest = json.loads(data[8 : 8 + size])["__metadata__"][METADATA_KEY].split(" ")
        start = data.find(digest.encode())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if len(digest) != len(NO_DIGEST) or start < 0:
        return None
    whole = hashlib.sha256(data[:start] + NO_DIGEST.encode())
    whole.update(memoryview(data)[start + len(NO_DIGEST) :])
    return about if whole.hexdigest() == digest else None


# -- the plan ------------------------------------------------------------------------------------


def _sweep_digest(key: Any, layout: Any) -> str:
    text = json.dumps([FORMAT, FORMAT_VERSION, key, layout], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back: lists for tuples, text for the keys of dicts."""
    return json.loads(json.dumps(dict(value)))


def _write_plan(path: Path, key: dict[str, Any], layout: dict[str, Any]) -> str:
    sweep = _sweep_digest(key, layout)
    record = {"format": FORMAT, "version": FORMAT_VERSION, "sha256": sweep}
    record |= {"key": key, "layout": layout}
    _write(path / PLAN_NAME, (json.dumps(record) + "\n").encode())
    return sweep


def _stored_layout(path: Path, key: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The layout of the sweep in the folder, which must have this key, and the sweep's digest."""
    record = _read_plan(path / PLAN_NAME)
    stored, layout, sweep = record.get("key"), record.get("layout"), record.get("sha256")
    if (
        not isinstance(stored, dict)
        or not isinstance(layout, dict)
        or not isinstance(sweep, str)
        or sweep != _sweep_digest(stored, layout)
    ):
        raise SourceError(
            f"{path / PLAN_NAME} was changed after it was written, so its chunks cannot be "
            f"trusted. Delete the folder and run the sweep again, or give another folder."
        )
    differences = [_difference(*place) for place in _differing("", stored, key)]
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        shown = "; ".join(differences[:SHOWN_DIFFERENCES])
        raise SourceError(
            f"the folder {path} holds another sweep: {shown}{f'; and {more} more' * (more > 0)}. "
            f"Give another folder, or delete this one to start anew."
        )
    return layout, sweep


def _read_plan(path: Path) -> dict[str, Any]:
    advice = "Give another folder, or delete this one to start anew."
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is torn or is not JSON: {error}. {advice}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise SourceError(f"{path} was not written by a sweep of fastlens. Give another folder.")
    if record.get("version") != FORMAT_VERSION:
        raise SourceError(
            f"{path} has format version {record.get('version')}; this fastlens reads "
            f"{FORMAT_VERSION}. Go on with the fastlens that wrote it. {advice}"
        )
    return record


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def _is_same(a: Any, b: Any) -> bool:
    if a is _ABSENT or b is _ABSENT:
        return a is b
    # As text, because NaN is not equal to itself and 1 is equal to True.
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _differing(
    name: str, there: dict[str, Any], here: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Name, value there and value here of each entry that differs."""
    prefix = f"{name}." if name else ""
    for part in dict.fromkeys([*here, *there]):
        a, b = there.get(part, _ABSENT), here.get(part, _ABSENT)
        if not _is_same(a, b):
            yield f"{prefix}{part}", a, b


def _difference(name: str, there: Any, here: Any) -> str:
    """``metric: 'logit difference' there, 'KL' here``, for the first place inside that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        return _difference(*next(_differing(name, there, here)))
    if isinstance(there, list) and isinstance(here, list):
        if len(there) != len(here):
            return f"{name}: {len(there)} entries there, {len(here)} here"
        pairs = enumerate(zip(there, here, strict=True))
        i, (a, b) = next((i, pair) for i, pair in pairs if not _is_same(*pair))
        return _difference(f"{name}[{i}]", a, b)
    return f"{name}: {_shortened(there)} there, {_shortened(here)} here"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- the folder and its files --------------------------------------------------------------------


def _listing(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SourceError(f"cannot list the folder {path}: {error.strerror or error}.") from error


def _check_ours(path: Path) -> None:
    """Refuse a folder that has files and no plan of ours; hidden files are nobody's work."""
    names = sorted(name for name in _listing(path) if not name.startswith("."))
    if PLAN_NAME in names:
        _read_plan(path / PLAN_NAME)
        return
    if not names:
        return
    if {JSON_NAME, TENSORS_NAME} & set(names):
        raise SourceError(
            f"the folder {path} holds scores written by Scores.save, with no {PLAN_NAME} to go on "
            f"from. Read them with Scores.load, and give the sweep a new or empty folder."
        )
    shown = ", ".join(map(repr, names[:SHOWN_DIFFERENCES]))
    raise SourceError(
        f"the folder {path} holds other things than a sweep: {shown}"
        f"{' and more' * (len(names) > SHOWN_DIFFERENCES)}. Give a new or empty folder."
    )


def _clear_temporary(path: Path) -> None:
    for folder in (path, path / CHUNKS_NAME):
        for name in _listing(folder):
            if TEMPORARY.fullmatch(name):
                with contextlib.suppress(OSError):
                    (folder / name).unlink()


def _write(path: Path, data: bytes) -> None:
    """`write_whole`, the new name on disk as well, and a word on what to do if it fails."""
    try:
        write_whole(path, data)
    except SourceError as error:
        raise SourceError(f"{error}{advice(error.__cause__)}") from error.__cause__
    flush_folder(path.parent)
