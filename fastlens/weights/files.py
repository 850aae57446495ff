"""Files of weights that are read again and again: unchanged, or held in memory."""

import io
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastlens.errors import SourceError

CHUNK_BYTES = 2**24


class WeightFiles:
    """Files as they were when they were first seen.

    Raises: SourceError if one has changed since, or is gone: half of a model would be of another.
    """

    def __init__(self, paths: Iterable[Path]):
        self._stamps = {path: _stamp(path) for path in paths}
        self._held: dict[Path, mmap.mmap] = {}

    def open(self, path: Path) -> Any:
        """The file, to read bytes from."""
        if path in self._held:
            return _HeldFile(self._held[path])
        try:
            # Unbuffered: what is read is large, and goes straight where it belongs.
            file = path.open("rb", buffering=0)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be opened any more: {error.strerror or error}. The model was "
                f"loaded from it: put it back, or load the model again."
            ) from error
        if _stamp(path) != self._stamps[path]:
            file.close()
            raise SourceError(
                f"{path} was changed since the model was opened, so what is read from it now may "
                f"be of another model. Load the model again."
            )
        return file

    def hold(self) -> int:
        """Keep all of their bytes in memory; returns how many."""
        for path in self._stamps:
            if path not in self._held:
                self._held[path] = self._whole(path)
        return sum(len(held) for held in self._held.values())

    def _whole(self, path: Path) -> mmap.mmap:
        size = self._stamps[path][0]
        # Pages of our own, not of the file: they cannot change or be lost.
        memory = mmap.mmap(-1, size)
        view = memoryview(memory)
        with self.open(path) as file:
            done = 0
            while done < size:
                got = read_some(file, view[done : done + CHUNK_BYTES], str(path))
                if not got:
                    raise SourceError(f"{path} ends too early. It is truncated: fetch it again.")
                done += got
        view.release()
        return memory


def read_some(file: Any, out: memoryview, what: str) -> int:
    """Bytes read into ``out``.

    Raises: SourceError that names ``what`` where the disk fails.
    """
    try:
        return int(file.readinto(out) or 0)
    except OSError as error:
        raise SourceError(
            f"{what} cannot be read: {error.strerror or error}. The disk or its connection fails: "
            f"check it, then load the model again."
        ) from error


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written to or replaced."""
    try:
        found = path.stat()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error
    return found.st_size, found.st_mtime_ns, found.st_ino


class _HeldFile(io.RawIOBase):
    """A file over bytes in memory, which it does not copy."""

    def __init__(self, held: mmap.mmap):
        self._view = memoryview(held)
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, counted from the start."""
        assert whence == io.SEEK_SET
        self._at = offset
        return offset

    def readinto(self, out: Any) -> int:
        """Fill ``out`` with what follows."""
        n = min(len(out), len(self._view) - self._at)
        out[:n] = self._view[self._at : self._at + n]
        self._at += n
        return n
