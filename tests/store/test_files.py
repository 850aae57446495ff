"""Whole files, advice on faults, the lock."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlens.errors import SourceError
from fastlens.store.files import FolderLock, advice, make_folder, write_parts


def test_a_file_is_written_whole(tmp_path: Path):
    write_parts(tmp_path / "a", [b"one ", memoryview(b"two")])
    assert (tmp_path / "a").read_bytes() == b"one two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_parts(tmp_path / "a", [b"old"])

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SourceError, match=r"cannot write .*a: No space left.*Free some space"):
        write_parts(tmp_path / "a", [b"new"])
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EIO])
def test_faults_come_with_advice(number: int):
    assert advice(OSError(number, "x")).startswith(" ")


def test_other_faults_come_without():
    assert advice(None) == advice(OSError(errno.EINVAL, "x")) == ""


def test_one_holder_of_a_lock(tmp_path: Path):
    make_folder(tmp_path / "a")
    lock = FolderLock(tmp_path / "a", "sweep")
    with pytest.raises(SourceError, match="in use by another sweep of this process"):
        FolderLock(tmp_path / "a", "sweep")
    assert lock.is_held
    lock.release()
    lock.release()
    assert not lock.is_held
    FolderLock(tmp_path / "a", "sweep").release()


FORK = """
import os, sys
from pathlib import Path
from fastlens.errors import SourceError
from fastlens.store.files import FolderLock

path = Path(sys.argv[1])
lock = FolderLock(path, "capture")
child = os.fork()
if child == 0:
    try:
        # Still the parent's; and the child's copy of it is closed.
        FolderLock(path, "capture")
    except SourceError:
        os._exit(0 if not lock.is_held else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert lock.is_held
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_child_holds_no_lock(tmp_path: Path):
    # In a process of its own: one with threads, as pytest's, should not fork.
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(SourceError, match="cannot make the folder"):
        make_folder(tmp_path / "a" / "b")
