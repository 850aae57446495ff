"""Where chunks wait between two layers: in memory, in the host's memory, or in a file without a
name, which is gone however the sweep ends."""

import contextlib
import errno
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fastlens.errors import SourceError
from fastlens.memory import said_bytes

# Tables of who patches what, of a chunk, that do not count as rows.
SLACK_BYTES = 2**20


@runtime_checkable
class Waiting(Protocol):
    """Keeps what chunks need while others are under way."""

    def put(self, chunk: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a chunk's tensors, in place of those kept before."""
        ...

    def take(self, chunk: int) -> dict[str, Tensor]:
        """Hand them back, and keep them no longer."""
        ...

    def put_use(self, chunk: int, use: Any) -> None:
        """Keep what a chunk needs in every layer."""
        ...

    def use(self, chunk: int) -> Any:
        """Hand that back, and keep it."""
        ...

    def drop(self, chunk: int) -> None:
        """Forget a chunk."""
        ...

    def close(self) -> None:
        """Forget everything, and give its room back."""
        ...


class InMemory:
    """As they are, or on another device.

    Args:
        device: Where tensors go while they wait; None leaves them where they are.
    """

    def __init__(self, device: torch.device | None = None):
        self._device = device
        self._tensors: dict[int, dict[str, Tensor]] = {}
        self._uses: dict[int, Any] = {}

    def put(self, chunk: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Waiting`."""
        to = self._device
        self._tensors[chunk] = {k: t if to is None else t.to(to) for k, t in tensors.items()}

    def take(self, chunk: int) -> dict[str, Tensor]:
        """See `Waiting`."""
        return self._tensors.pop(chunk)

    def put_use(self, chunk: int, use: Any) -> None:
        """See `Waiting`."""
        self._uses[chunk] = use

    def use(self, chunk: int) -> Any:
        """See `Waiting`."""
        return self._uses[chunk]

    def drop(self, chunk: int) -> None:
        """See `Waiting`."""
        self._tensors.pop(chunk, None)
        self._uses.pop(chunk, None)

    def close(self) -> None:
        """See `Waiting`."""
        self._tensors.clear()
        self._uses.clear()


class OnDisk:
    """In one temporary file that has no name: the system frees it when the process ends, killed or
    not.

    Args:
        folder: Where it is; None is the system's folder for temporary files (``TMPDIR``).
        expected: Bytes that will be in it at once.

    Attributes:
        written, read: Bytes so far.

    Raises: SourceError if the disk has less room than expected, or cannot be written to.
    """

    def __init__(self, folder: Path | None = None, expected: int = 0):
        self.folder = spill_folder(folder)
        self.written = self.read = 0
        # Chunk -> (place in the file, bytes it may take there).
        self._regions: dict[tuple[int, str], tuple[int, int]] = {}
        self._free: list[tuple[int, int]] = []
        self._end = 0
        self._kept: dict[int, list[tuple[str, torch.dtype, tuple[int, ...]]]] = {}
        free = free_on_disk(self.folder)
        if expected > free:
            raise SourceError(
                f"rows of runs that wait take {said_bytes(expected)} on the disk of {self.folder}, "
                f"which has {said_bytes(free)} free. {_ADVICE}"
            )
        try:
            # Unbuffered: what is written is written from the tensor's own memory.
            self._file = tempfile.TemporaryFile(  # noqa: SIM115
                dir=self.folder, prefix=".fastlens-", buffering=0
            )
        except OSError as error:
            raise self._refused("written to", error) from error

    def put(self, chunk: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Waiting`.

        Raises: SourceError if the disk is full or fails.
        """
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = [(name, t.dtype, tuple(t.shape)) for name, t in plain.items()]
        at = self._region(chunk, "rows", sum(t.nbytes for t in plain.values()))
        for tensor in plain.values():
            at = self._write(at, _bytes_of(tensor))
        self._kept[chunk] = about

    def take(self, chunk: int) -> dict[str, Tensor]:
        """See `Waiting`.

        Raises: SourceError if the disk fails.
        """
        at, _ = self._regions[chunk, "rows"]
        found = {}
        for name, dtype, shape in self._kept.pop(chunk):
            found[name] = torch.empty(shape, dtype=dtype)
            at = self._read(at, _bytes_of(found[name]))
        return found

    def put_use(self, chunk: int, use: Any) -> None:
        """See `Waiting`."""
        data = pickle.dumps(use, protocol=5)
        at = self._region(chunk, "use", len(data))
        self._write(at, memoryview(data))
        self._regions[chunk, "use"] = (at, len(data))

    def use(self, chunk: int) -> Any:
        """See `Waiting`."""
        at, size = self._regions[chunk, "use"]
        data = bytearray(size)
        self._read(at, memoryview(data))
        return pickle.loads(data)

    def drop(self, chunk: int) -> None:
        """See `Waiting`."""
        self._kept.pop(chunk, None)
        for what in ("rows", "use"):
            region = self._regions.pop((chunk, what), None)
            if region is not None:
                self._free.append(region)

    def close(self) -> None:
        """See `Waiting`."""
        self._file.close()

    def _region(self, chunk: int, what: str, size: int) -> int:
        """Where so many bytes of a chunk go: where it was, if that is large enough."""
        place = self._regions.pop((chunk, what), None)
        if place is None or place[1] < size:
            if place is not None:
                self._free.append(place)
            fitting = [region for region in self._free if region[1] >= size]
            if fitting:
                place = min(fitting, key=lambda region: region[1])
                self._free.remove(place)
            else:
                place = (self._end, size)
                self._end += size
        self._regions[chunk, what] = place
        return place[0]

    def _write(self, at: int, data: memoryview) -> int:
        try:
            self._file.seek(at)
            done = 0
            while done < len(data):
                done += self._file.write(data[done:]) or 0
        except OSError as error:
            raise self._refused("written to", error) from error
        self.written += len(data)
        return at + len(data)

    def _read(self, at: int, data: memoryview) -> int:
        try:
            self._file.seek(at)
            done = 0
            while done < len(data):
                got = self._file.readinto(data[done:])  # type: ignore[attr-defined]
                if not got:
                    raise OSError(errno.EIO, "the file is shorter than what was written")
                done += got
        except OSError as error:
            raise self._refused("read", error) from error
        self.read += len(data)
        return at + len(data)

    def _refused(self, what: str, error: OSError) -> SourceError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return SourceError(
            f"the temporary file for rows of runs that wait, in {self.folder}, cannot be {what}: "
            f"{error.strerror or error}.{f' {_ADVICE}' if full else ''}"
        )


_ADVICE = (
    "Free some space there, set TMPDIR to a folder on a larger disk, or give the sweep more memory "
    "(memory=, max_memory=)."
)


def spill_folder(folder: Path | None = None) -> Path:
    """Where rows wait: the folder given, or the system's for temporary files."""
    return Path(tempfile.gettempdir()) if folder is None else folder


def free_on_disk(folder: Path | None = None) -> int:
    """Bytes that can be written there; 0 if there is no such folder."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(spill_folder(folder)).free
    return 0


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: np.ndarray = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else _NOTHING
    return flat.data


_NOTHING = np.zeros(0, dtype=np.uint8)
