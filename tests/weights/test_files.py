"""Weight files that are read again and again."""

import os

import pytest

from fastlens.errors import SourceError
from fastlens.weights.files import WeightFiles, read_some


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(200)))
    return file


def read(files, path, start, n):
    out = bytearray(n)
    with files.open(path) as file:
        file.seek(start)
        got = read_some(file, memoryview(out), "it")
    return bytes(out[:got])


def test_bytes_from_disk_and_from_memory(path):
    files = WeightFiles([path])
    assert read(files, path, 10, 5) == bytes(range(10, 15))
    assert files.hold() == 200
    assert files.hold() == 200
    path.unlink()
    assert read(files, path, 10, 5) == bytes(range(10, 15))
    assert read(files, path, 198, 5) == bytes([198, 199])


def test_a_changed_file_is_refused(path):
    files = WeightFiles([path])
    os.utime(path, ns=(0, 0))
    with pytest.raises(SourceError, match="was changed since the model was opened"):
        files.open(path)


def test_a_replaced_file_is_refused(path):
    files = WeightFiles([path])
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    stat = path.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    with pytest.raises(SourceError, match="was changed"):
        files.open(path)


def test_a_file_that_is_gone(path):
    files = WeightFiles([path])
    path.unlink()
    with pytest.raises(SourceError, match="cannot be opened any more: No such file"):
        files.open(path)
    with pytest.raises(SourceError, match="No such file"):
        WeightFiles([path])


def test_a_file_that_ends_while_it_is_taken_into_memory(path, monkeypatch):
    files = WeightFiles([path])
    monkeypatch.setattr("fastlens.weights.files.read_some", lambda *_: 0)
    with pytest.raises(SourceError, match="ends too early"):
        files.hold()


def test_a_disk_that_fails():
    class Broken:
        def readinto(self, out):
            raise OSError(5, "Input/output error")

    with pytest.raises(SourceError, match="model: W_Q cannot be read: Input/output error"):
        read_some(Broken(), memoryview(bytearray(4)), "model: W_Q")
