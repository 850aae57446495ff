"""Files that are whole or not there: written beside their place, flushed, renamed; and locks."""

import contextlib
import errno
import os
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

from fastlens.errors import SourceError

if sys.platform != "win32":
    import fcntl

LOCK_NAME = ".lock"


def fault(what: str, path: Path, error: OSError) -> SourceError:
    """The error for a disk's fault: what was tried, what the system said, what to do."""
    return SourceError(f"cannot {what} {path}: {error.strerror or error}.{advice(error)}")


def advice(error: BaseException | None) -> str:
    """A sentence on what to do, with a space in front; empty if there is nothing to say."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return " Free some space there, or give another folder."
    if number == errno.EFBIG:
        return " Raise the limit on the size of a file (ulimit -f)."
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return " Give a folder that you may write to."
    if number == errno.EIO:
        return " The disk, or the connection to it, is failing: copy what is readable."
    return ""


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file as one, on disk when this returns: no reader sees half of it, nor does a kill.

    Raises: SourceError if it cannot be written; an older file of that name is then untouched.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise fault("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    flush_folder(path.parent)


def make_folder(path: Path) -> None:
    """The folder, and its name on disk.

    Raises: SourceError if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fault("make the folder", path, error) from error
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Names on disk, where the system can do that; checksums do not rest on it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class FolderLock:
    """The right to write into a folder, held until `release` or the death of the process.

    Where the system has no ``flock`` (Windows, some network disks) nothing is locked. A forked
    child shares no lock: it would hold it on after its parent's death.

    Args:
        path: Of a folder that is there.
        job: What is going on there, for those who are refused: "sweep", "capture".

    Attributes:
        is_held: False once it was released.

    Raises: SourceError if another process, or this one, holds it.
    """

    is_held: bool

    def __init__(self, path: Path, job: str):
        self._file = None if sys.platform == "win32" else _locked(path, job)
        self.is_held = True
        _LOCKS.add(self)

    def release(self) -> None:
        """Let others have the folder; a second call does nothing."""
        self.is_held = False
        held, self._file = self._file, None
        if held is not None:
            os.close(held)


def _locked(path: Path, job: str) -> int:
    """An open file with the lock; the system drops it when the process dies."""
    try:
        held = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise fault("write into the folder", path, error) from error
    ours = f"process {os.getpid()} on {os.uname().nodename}"
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(held, 0)
        os.write(held, ours.encode())
    except BlockingIOError as error:
        holder = os.pread(held, 200, 0).decode(errors="replace").strip() or "another process"
        holder = f"another {job} of this process" if holder == ours else holder
        os.close(held)
        raise SourceError(
            f"the folder {path} is in use by {holder}. Wait until that {job} is done or end it, "
            f"or give another folder."
        ) from error
    except OSError:
        # No flock on this file system, or no space for the number of the process: both are extras.
        pass
    return held


_LOCKS: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_LOCKS):
        lock.release()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_release_in_child)
