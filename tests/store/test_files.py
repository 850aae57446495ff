"""Whole files, advice on faults, the lock."""

import errno
import os
from pathlib import Path

import pytest

from fastlens.errors import SourceError
from fastlens.store.files import advice, lock, make_folder, unlock, write_parts


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
    held = lock(tmp_path / "a")
    with pytest.raises(SourceError, match="being written by this process"):
        lock(tmp_path / "a")
    unlock(held)
    unlock(lock(tmp_path / "a"))


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(SourceError, match="cannot make the folder"):
        make_folder(tmp_path / "a" / "b")
