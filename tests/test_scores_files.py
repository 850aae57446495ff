"""The pair of files that scores are kept in. What `Scores` puts there is tested with `Scores`."""

import json

import pytest
import torch

from fastlens.errors import SourceError
from fastlens.scores_files import (
    JSON_NAME,
    TENSORS_NAME,
    read_record,
    writable_folder,
    write_record,
    write_whole,
)


def test_a_record_comes_back(tmp_path):
    tensors = {"values": torch.randn(3, 2).T}
    write_record(tmp_path, {"title": "中", "ids": torch.tensor([1]), "dtype": torch.half}, tensors)
    record, read = read_record(tmp_path)
    assert (record["title"], record["ids"], record["dtype"]) == ("中", [1], "torch.float16")
    assert torch.equal(read["values"], tensors["values"])


def test_a_hash_of_something_that_is_no_tensor_file(tmp_path):
    """The files belong together, and one still holds no tensors."""
    write_record(tmp_path, {}, {"values": torch.zeros(1)})
    import hashlib

    record = json.loads((tmp_path / JSON_NAME).read_text())
    record["sha256"] = hashlib.sha256(b"nothing").hexdigest()
    (tmp_path / JSON_NAME).write_text(json.dumps(record))
    (tmp_path / TENSORS_NAME).write_bytes(b"nothing")
    with pytest.raises(SourceError, match=f"{TENSORS_NAME} is no safetensors file"):
        read_record(tmp_path)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    import os

    def full(descriptor):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SourceError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_made(tmp_path):
    assert list(writable_folder(tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot write into the folder"):
        writable_folder(tmp_path / "file")
