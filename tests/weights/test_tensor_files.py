"""Checkpoint readers: exact values, and a sentence for every way a file can be broken."""

import json
import pickle
import struct

import pytest
import safetensors.torch
import torch

from fastlens.errors import SourceError
from fastlens.weights import tensor_files
from fastlens.weights.tensor_files import (
    LiveReader,
    PickleReader,
    SafetensorsReader,
    folder_reader,
    fresh,
    safetensors_header,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    out = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    out |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "bool": torch.eye(2) > 0}
    return out


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors(), path)
    return path


def test_values_are_those_of_safetensors(file):
    reader = SafetensorsReader([file])
    assert reader.shapes == {name: tuple(t.shape) for name, t in tensors().items()}
    for name, tensor in tensors().items():
        got = reader.read(name)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)


@pytest.mark.parametrize("chunk", [16, 2**24])
def test_conversion_goes_chunk_by_chunk(file, monkeypatch, chunk):
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", chunk)
    reader = SafetensorsReader([file])
    for name in ("torch.bfloat16", "torch.float32", "scalar", "empty"):
        got = reader.read(name, torch.float64)
        assert got.dtype == torch.float64 and torch.equal(got, tensors()[name].double())


def test_two_reads_share_nothing(file):
    reader = SafetensorsReader([file])
    reader.read("torch.float32").zero_()
    assert torch.equal(reader.read("torch.float32"), tensors()["torch.float32"])


def test_fresh_memory_is_a_normal_tensor():
    big = fresh((100, 100), torch.float32)
    assert big.shape == (100, 100) and big.is_contiguous() and not big.any()
    big.add_(1)
    assert big.clone().sum() == 10_000 and fresh((2,), torch.bfloat16).shape == (2,)


# -- broken safetensors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "message"),
    [(4, "is not a whole"), (40, "is not a whole"), (-1, "is truncated: .* ends at byte")],
)
def test_truncated_files_are_named(file, kept, message):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(SourceError, match=f"model.safetensors {message}"):
        SafetensorsReader([file])


def header_file(path, header) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{]", "corrupt safetensors header"),
        ([1], "corrupt safetensors header"),
        ({"x": {"dtype": "F32"}}, "corrupt safetensors header"),
        ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "F32 cannot take 8 bytes"),
        ({"x": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}, "stored as F8_E4M3"),
    ],
)
def test_corrupt_headers_are_named(tmp_path, header, message):
    path = tmp_path / "model.safetensors"
    header_file(path, header)
    with pytest.raises(SourceError, match=message):
        safetensors_header(path)


def test_a_file_that_shrinks_while_it_is_read(file):
    reader = SafetensorsReader([file])
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(SourceError, match="was changed since"):
        for name in tensors():
            reader.read(name)


# -- folders ---------------------------------------------------------------------------------------


def sharded(folder, suffix="safetensors"):
    """Two shards with an index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {}
    for number in (1, 2):
        name = f"{stem}-0000{number}-of-00002.{suffix}"
        content = {f"t{number}": torch.full((2, 2), float(number))}
        if suffix == "bin":
            torch.save(content, folder / name)
        else:
            safetensors.torch.save_file(content, folder / name)
        index[f"t{number}"] = name
    path = folder / f"{stem}.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, suffix):
    sharded(tmp_path, suffix)
    reader = folder_reader(tmp_path)
    assert reader.shapes == {"t1": (2, 2), "t2": (2, 2)}
    assert reader.read("t2").tolist() == [[2.0, 2.0], [2.0, 2.0]]
    (next(tmp_path.glob(f"*-00002-of-00002.{suffix}"))).unlink()
    with pytest.raises(SourceError, match=r"2 shards, of which 1 are missing: .*00002-of-00002"):
        folder_reader(tmp_path)


def test_an_index_that_does_not_fit_its_shards(tmp_path):
    path = sharded(tmp_path)
    index = json.loads(path.read_text())
    index["weight_map"]["lost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(SourceError, match="lists 1 tensors that are not in their files: lost"):
        folder_reader(tmp_path)
    path.write_text("[]")
    with pytest.raises(SourceError, match="not a weights index"):
        folder_reader(tmp_path)


def test_safetensors_come_before_pickles(tmp_path, file):
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert "scalar" in folder_reader(tmp_path).shapes
    file.rename(tmp_path / "adapted.safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    assert "scalar" in folder_reader(tmp_path).shapes


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"no weights that can be read.*Found: notes\.txt"):
        folder_reader(tmp_path)


# -- pickles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_tensors(tmp_path, zipped):
    path = tmp_path / "pytorch_model.bin"
    saved = {"a": torch.arange(6.0).view(2, 3).t(), "version": 3}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    reader = PickleReader([path])
    assert reader.shapes == {"a": (3, 2)}
    got = reader.read("a")
    assert torch.equal(got, saved["a"]) and got.is_contiguous()
    got.zero_()
    assert torch.equal(reader.read("a", torch.float64), saved["a"].double())


class Exploit:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickle_is_never_executed(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1), "b": Exploit()}, path)
    with pytest.raises(SourceError, match=r"pytorch_model\.bin cannot be read .* was executed"):
        PickleReader([path])
    path.write_bytes(pickle.dumps(Exploit(), protocol=2))
    with pytest.raises(SourceError, match="cannot be read"):
        PickleReader([path])


def test_broken_pickles_are_named(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SourceError, match="truncated, corrupt, or holds more than tensors"):
        PickleReader([path])
    torch.save([torch.zeros(1)], path)
    with pytest.raises(SourceError, match="holds a list"):
        PickleReader([path])


# -- in memory -------------------------------------------------------------------------------------


def test_a_live_model_is_not_copied():
    linear = torch.nn.Linear(3, 2)
    reader = LiveReader(linear.state_dict(keep_vars=True))
    got = reader.read("weight", torch.float32)
    assert got.data_ptr() == linear.weight.data_ptr() and not got.requires_grad
    assert reader.read("weight", torch.float64).dtype == torch.float64


def test_a_model_without_weights_is_refused():
    with pytest.raises(SourceError, match="on the meta device, weight among them"):
        LiveReader(torch.nn.Linear(3, 2, device="meta").state_dict())


def test_an_old_pickle_is_read_once(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    saved = {f"t{n}": torch.full((2,), float(n)) for n in range(5)}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    reader = PickleReader([path])
    path.unlink()
    assert all(torch.equal(reader.read(name), saved[name]) for name in saved)


def test_rows_and_memory_that_is_given(file):
    reader = SafetensorsReader([file])
    for name, shape in reader.shapes.items():
        whole = reader.read(name)
        out = torch.empty(shape, dtype=whole.dtype)
        assert reader.read(name, whole.dtype, out) is out
        assert torch.equal(out, whole)
        if len(shape) == 2 and shape[0] > 2 and whole.is_floating_point():
            rows = torch.tensor([0, 1, shape[0] - 1])
            assert torch.equal(reader.read_rows(name, rows), whole[rows])
            assert reader.read_rows(name, rows[:0]).shape == (0, shape[1])
