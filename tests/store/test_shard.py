"""Shards: bytes on disk, parts of them, and what is found when they are not what was written."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastlens.errors import ShapeError, SourceError
from fastlens.store import shard as shard_module
from fastlens.store.shard import NAME_OF_DTYPE, Shard, digest_of_tensor, write_shard


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pattern": torch.randn(3, 4, 6, 6, generator=generator),
        "resid": torch.randn(3, 6, 8, generator=generator).bfloat16(),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2, dtype=torch.int64),
    }


@pytest.fixture
def shard(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Shard:
    return write_shard(tmp_path / "0.safetensors", tensors, {"n": 1})


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all reads."""
    sizes: list[int] = []

    def counting(file: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return os.pread(file, size, offset)

    monkeypatch.setattr(shard_module, "pread", counting)
    return sizes


def test_others_can_read_it(shard: Shard, tensors: dict[str, torch.Tensor]):
    found = load_file(shard.path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_reading_and_mapping_give_the_same(shard: Shard, tensors: dict[str, torch.Tensor]):
    for name, tensor in tensors.items():
        for found in (shard.read(name), shard.mapped(name)):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found, tensor)


def test_every_dtype_survives(tmp_path: Path):
    tensors = {name: torch.ones(3).to(dtype) for dtype, name in NAME_OF_DTYPE.items()}
    shard = write_shard(tmp_path / "a", tensors, {})
    assert all(torch.equal(shard.read(name), tensors[name]) for name in tensors)
    with pytest.raises(ShapeError, match="complex64"):
        write_shard(tmp_path / "b", {"c": torch.zeros(2, dtype=torch.complex64)}, {})


def test_a_record_gives_the_same_shard(shard: Shard):
    assert Shard.of_record(shard.path.parent, shard.record()) == shard


@pytest.mark.parametrize(
    ("part", "index"),
    [
        ([slice(1, 2)], (slice(1, 2),)),
        ([None, [2]], (slice(None), [2])),
        ([None, [3, 0]], (slice(None), [3, 0])),
        ([None, None, slice(2, 5)], (slice(None), slice(None), slice(2, 5))),
        ([[2, 0], [1], None, slice(0, 1)], None),
        ([slice(0, 0)], (slice(0, 0),)),
        ([], ()),
    ],
)
def test_a_part_costs_its_own_bytes(
    shard: Shard, tensors: dict[str, torch.Tensor], read_bytes: list[int], part, index
):
    shard.read("mask")
    read_bytes.clear()
    found = shard.read("pattern", part)
    whole = tensors["pattern"]
    expected = whole[[2, 0]][:, [1]][..., :1] if index is None else whole[index]
    assert torch.equal(found, expected)
    assert sum(read_bytes) == found.nbytes


def test_another_shape_of_the_same_numbers(shard: Shard, tensors: dict[str, torch.Tensor]):
    found = shard.read("resid", [slice(4, 9)], shape=(18, 8))
    assert torch.equal(found, tensors["resid"].reshape(18, 8)[4:9])


def test_mapped_pages_are_not_written_back(shard: Shard, tensors: dict[str, torch.Tensor]):
    shard.mapped("resid").zero_()
    assert torch.equal(shard.read("resid"), tensors["resid"])


@pytest.mark.parametrize("part", [[[9]], [slice(0, 4, 2)], [None] * 5])
def test_parts_that_are_not_there(shard: Shard, part):
    with pytest.raises(ShapeError):
        shard.read("pattern", part)


def test_a_name_that_is_not_there(shard: Shard):
    with pytest.raises(SourceError, match="has no 'patern'"):
        shard.read("patern")


def test_a_truncated_shard_is_named(shard: Shard):
    os.truncate(shard.path, shard.nbytes - 1)
    for read in (shard.read, shard.mapped):
        with pytest.raises(SourceError, match=r"0\.safetensors \(resid\) is torn: it has"):
            read("resid")
    with pytest.raises(SourceError, match="is torn"):
        shard.check_size()
    assert "is torn" in shard.verify()[0]


def test_a_missing_shard_is_named(shard: Shard):
    shard.path.unlink()
    with pytest.raises(SourceError, match=r"cannot read 'resid' from .*0\.safetensors"):
        shard.read("resid")
    with pytest.raises(SourceError, match="cannot be read"):
        shard.check_size()


def test_a_changed_header_is_found_at_the_first_read(shard: Shard):
    fresh = Shard.of_record(shard.path.parent, shard.record())
    data = bytearray(shard.path.read_bytes())
    data[20] ^= 1
    shard.path.write_bytes(data)
    with pytest.raises(SourceError, match="header"):
        fresh.read("resid")


def test_a_file_changed_underneath_is_refused(shard: Shard):
    shard.read("resid")
    data = bytearray(shard.path.read_bytes())
    data[-1] ^= 1
    other = shard.path.with_name("other")
    other.write_bytes(data)
    other.replace(shard.path)
    for read in (shard.read, shard.mapped):
        with pytest.raises(SourceError, match="was changed since it was first read"):
            read("resid")


def test_verify_names_the_tensor_whose_bytes_changed(shard: Shard):
    assert shard.verify() == []
    data = bytearray(shard.path.read_bytes())
    data[shard.places["resid"].offset + 5] ^= 1
    shard.path.write_bytes(data)
    fresh = Shard.of_record(shard.path.parent, shard.record())
    (fault,) = fresh.verify()
    assert "'resid'" in fault and str(shard.path) in fault


def test_a_read_error_is_a_sentence(shard: Shard, monkeypatch: pytest.MonkeyPatch):
    def failing(file: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shard_module, "pread", failing)
    with pytest.raises(SourceError, match=r"cannot read 'resid' from .*The disk"):
        shard.read("resid")
    assert "Input/output error" in shard.verify()[0]


def test_a_digest_is_of_the_bytes():
    a = torch.tensor([1.0, 2.0])
    assert digest_of_tensor(a) == digest_of_tensor(a.clone()) != digest_of_tensor(a + 1)
