"""One shard: a safetensors file, what the index says of it, and reading parts of it."""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlens.errors import ShapeError, SourceError
from fastlens.store.files import fault, write_parts

# As the safetensors format writes number types.
NAME_OF_DTYPE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_OF_NAME = {name: dtype for dtype, name in NAME_OF_DTYPE.items()}
METADATA = {"format": "pt", "written_by": "fastlens.store"}
# What is read from disk to check a whole shard, at a time.
BLOCK = 2**22


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its shard.

    Attributes:
        dtype, shape: The tensor's.
        offset: Of its first byte, from the start of the file.
        digest: BLAKE2b of its bytes, 16 bytes in hexadecimal.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another one that took its place."""

    size: int
    time: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """The stamp of a file as it is now."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass
class Shard:
    """A file of tensors that was written whole.

    Opening a store compares the file's size; the first read of a shard its header with the digest
    in the index; every read size, time of change and inode with what they were at that moment.
    Bytes of tensors are compared with their digests by `verify` only.

    Attributes:
        path: The file.
        nbytes: Its size.
        header: Digest of its first bytes, up to the tensors.
        places: Where each tensor lies.
        about: What the writer said of it, as JSON.
    """

    path: Path
    nbytes: int
    header: str
    places: dict[str, Place]
    about: dict[str, Any]
    _stamp: Stamp | None = None

    def record(self) -> dict[str, Any]:
        """As the index holds it."""
        tensors = {
            name: [NAME_OF_DTYPE[place.dtype], list(place.shape), place.offset, place.digest]
            for name, place in self.places.items()
        }
        return {
            "shard": self.path.name,
            "bytes": self.nbytes,
            "header": self.header,
            "tensors": tensors,
            "about": self.about,
        }

    @classmethod
    def of_record(cls, folder: Path, record: Mapping[str, Any]) -> "Shard":
        """The shard of a line of the index."""
        places = {
            name: Place(DTYPE_OF_NAME[dtype], tuple(shape), offset, digest)
            for name, (dtype, shape, offset, digest) in record["tensors"].items()
        }
        path = folder / record["shard"]
        return cls(path, record["bytes"], record["header"], places, record["about"])

    def check_size(self) -> None:
        """Raises: SourceError, naming shard and tensors, if the file is gone or cut off."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise SourceError(f"{self._named()} cannot be read: {error.strerror}.") from error
        if size != self.nbytes:
            raise SourceError(f"{self._named()} is torn: it has {size:,} of {self.nbytes:,} bytes.")

    def mapped(self, name: str) -> Tensor:
        """The tensor in memory-mapped pages of the file: what is not looked at is not read.

        Writing into it changes pages of this process, never the file. A disk that fails while such
        pages are read, or a file that is cut off by then, ends the process (SIGBUS), as with any
        mapped file; `read` raises errors instead.

        Raises: SourceError as `read`.
        """
        place = self._place(name)
        if not place.nbytes:
            return torch.empty(place.shape, dtype=place.dtype)
        try:
            with self.path.open("rb") as file:
                self._check(file.fileno(), name)
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except SourceError:
            raise
        except OSError as error:
            raise fault(f"read {name!r} from", self.path, error) from error
        count = math.prod(place.shape)
        flat = torch.frombuffer(pages, dtype=place.dtype, count=count, offset=place.offset)
        return flat.view(place.shape)

    def read(
        self,
        name: str,
        part: Sequence[slice | Sequence[int] | None] = (),
        shape: Sequence[int] | None = None,
    ) -> Tensor:
        """The tensor, or a part of it, as a new tensor; only bytes of that part are read.

        Args:
            part: For each axis, from the first: a slice of step 1, indices, or None for all.
            shape: Another one of as many numbers, as `torch.Tensor.view` would make it.

        Raises: SourceError if the file cannot be read, or is not the one that was written;
            ShapeError for a part that is not there.
        """
        place = self._place(name)
        if shape is not None:
            place = replace(place, shape=(*shape,))
        missing = len(place.shape) - len(part)
        if missing < 0:
            raise ShapeError(
                f"{len(part)} choices for {name!r} of {len(place.shape)} axes: give one an axis."
            )
        chosen = [*map(_indices, (*part, *[None] * missing), place.shape)]
        found = bytearray(math.prod(map(len, chosen)) * place.dtype.itemsize)
        view, done = memoryview(found), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                self._check(file.fileno(), name)
                for start, size in _runs(chosen, place):
                    _read_into(file.fileno(), view[done : done + size], start)
                    done += size
        except SourceError:
            raise
        except OSError as error:
            raise fault(f"read {name!r} from", self.path, error) from error
        shape = [len(indices) for indices in chosen]
        if not found:
            return torch.empty(shape, dtype=place.dtype)
        return torch.frombuffer(found, dtype=place.dtype).view(shape)

    def verify(self) -> list[str]:
        """A sentence for each tensor whose bytes are not those written. Reads all."""
        try:
            self.check_size()
            with self.path.open("rb", buffering=0) as file:
                self._check(file.fileno(), "")
                return [
                    f"{self.path} is damaged: the bytes of {name!r} are not those written."
                    for name, place in self.places.items()
                    if _digest_of_file(file.fileno(), place.offset, place.nbytes) != place.digest
                ]
        except SourceError as error:
            return [str(error)]
        except OSError as error:
            return [str(fault("read", self.path, error))]

    def _place(self, name: str) -> Place:
        if name not in self.places:
            raise SourceError(f"{self.path} has no {name!r}, only {', '.join(self.places)}.")
        return self.places[name]

    def _check(self, file: int, name: str) -> None:
        """The open file is the one that was written."""
        stamp = Stamp.of(os.fstat(file))
        if stamp.size != self.nbytes:
            raise SourceError(
                f"{self._named(name)} is torn: it has {stamp.size:,} of {self.nbytes:,} bytes."
            )
        if self._stamp is None:
            size = min((place.offset for place in self.places.values()), default=self.nbytes)
            if _digest_of_file(file, 0, size) != self.header:
                raise SourceError(
                    f"{self._named(name)} is torn or was changed: its header is not the one that "
                    f"the index has. The other shards can be read."
                )
            self._stamp = stamp
        if stamp != self._stamp:
            raise SourceError(
                f"{self._named(name)} was changed since it was first read here. Open the store "
                f"again, and call verify() to see whether its bytes are those written."
            )

    def _named(self, name: str = "") -> str:
        return f"{self.path} ({name or ', '.join(self.places)})"


def write_shard(path: Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> Shard:
    """Put tensors into a new file; on return it is on disk. The same tensors give the same bytes.

    Raises: SourceError if it cannot be written; ShapeError for a number type that the format lacks.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in NAME_OF_DTYPE:
            known = ", ".join(str(dtype) for dtype in NAME_OF_DTYPE)
            raise ShapeError(f"{name!r} is {tensor.dtype}; a store takes {known}. Cast it.")
        plain[name] = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # Wide numbers first, so that each lies at a multiple of its size, without gaps.
    order = sorted(plain, key=lambda name: -plain[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": METADATA}
    at = 0
    for name in order:
        end = at + plain[name].nbytes
        kind, shape = NAME_OF_DTYPE[plain[name].dtype], list(plain[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    top = len(text).to_bytes(8, "little") + text
    places, views, at = {}, [], len(top)
    for name in order:
        views.append(_bytes_of(plain[name]))
        places[name] = Place(
            plain[name].dtype, tuple(plain[name].shape), at, digest_of_tensor(plain[name])
        )
        at += plain[name].nbytes
    write_parts(path, [top, *views])
    return Shard(path, at, _digest([top]), {name: places[name] for name in plain}, about)


def digest_of_tensor(tensor: Tensor) -> str:
    """BLAKE2b of a contiguous tensor's bytes, as `Place.digest`."""
    return _digest([_bytes_of(tensor)])


def _bytes_of(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(parts: Sequence[bytes | memoryview]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def _digest_of_file(file: int, offset: int, size: int) -> str:
    whole = hashlib.blake2b(digest_size=16)
    block = memoryview(bytearray(min(BLOCK, size)))
    for start in range(offset, offset + size, BLOCK):
        piece = block[: min(BLOCK, offset + size - start)]
        _read_into(file, piece, start)
        whole.update(piece)
    return whole.hexdigest()


def pread(file: int, size: int, offset: int) -> bytes:
    """`os.pread`: every byte that `Shard.read` takes from a disk passes here."""
    return os.pread(file, size, offset)


def _read_into(file: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        got = pread(file, min(BLOCK, len(view) - done), offset + done)
        if not got:
            raise SourceError(f"a file ended {len(view) - done} bytes early while it was read.")
        view[done : done + len(got)] = got
        done += len(got)


def _indices(chosen: slice | Sequence[int] | None, size: int) -> Sequence[int]:
    if chosen is None:
        return range(size)
    if isinstance(chosen, slice):
        found = range(*chosen.indices(size))
        if found.step != 1:
            raise ShapeError(f"slice {chosen} has a step; a part of a store is of step 1.")
        return found
    for index in chosen:
        if not -size <= index < size:
            raise ShapeError(f"index {index} of an axis of {size}: counted from 0.")
    return [index % size for index in chosen]


def _runs(chosen: Sequence[Sequence[int]], place: Place) -> Iterator[tuple[int, int]]:
    """Offset and length of the stretches of bytes that hold the part, in its order."""
    if not all(map(len, chosen)):
        return
    # Behind this axis everything is taken, so one stretch covers it.
    last = len(chosen)
    while last and chosen[last - 1] == range(place.shape[last - 1]):
        last -= 1
    size = place.dtype.itemsize * math.prod(place.shape[last:])
    strides = [math.prod(place.shape[axis + 1 : last]) for axis in range(last)]
    start, length = -1, 0
    for at in product(*chosen[:last]):
        offset = place.offset + size * sum(i * s for i, s in zip(at, strides, strict=True))
        if offset == start + length and length:
            length += size
            continue
        if length:
            yield start, length
        start, length = offset, size
    yield start, length
