"""GGUF files: the gguf package's own values, and a sentence for every broken file."""

import sys

import numpy as np
import pytest
import torch

from fastlens.errors import MissingDependencyError, SourceError
from fastlens.weights import gguf_file
from fastlens.weights.gguf_file import GgufReader

gguf = pytest.importorskip("gguf")
KINDS = ["F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"]


def write(path, kinds=KINDS):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.eps", 0.5)
    writer.add_bool("llama.flag", True)
    writer.add_array("llama.sections", [1, 2, 3])
    writer.add_array("tokenizer.ggml.tokens", [f"token {n}" for n in range(50)])
    writer.add_array("tokenizer.ggml.token_type", [1] * 2000)
    for name in kinds:
        kind = gguf.GGMLQuantizationType[name]
        values = rng.standard_normal((70, 64)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "tiny.gguf")


def test_metadata(path):
    metadata = GgufReader(path).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 3 and metadata["llama.eps"] == 0.5
    assert metadata["llama.flag"] is True and metadata["llama.sections"] == [1, 2, 3]
    # Vocabularies are passed over; their length is what a config may need.
    assert metadata["tokenizer.ggml.tokens"] == 50
    assert metadata["tokenizer.ggml.token_type"] == 2000


@pytest.mark.parametrize("chunk", [gguf_file.CHUNK_BYTES, 4096])
def test_values_are_those_of_the_gguf_package(path, monkeypatch, chunk):
    monkeypatch.setattr(gguf_file, "CHUNK_BYTES", chunk)
    reader = GgufReader(path)
    for tensor in gguf.GGUFReader(path).tensors:
        want = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert reader.shapes[tensor.name] == (70, 64)
        got = reader.read(tensor.name, torch.float32)
        assert torch.equal(got, want), tensor.name
        assert torch.equal(reader.read(tensor.name, torch.float64), want.double())
    assert reader.read("F16").dtype == torch.float16
    assert reader.read("Q8_0").dtype == torch.float32


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "does not begin with GGUF"),
        (30, "header that breaks off or is corrupt at byte"),
        (1000, "header that breaks off or is corrupt"),
        (-500, "is truncated: Q8_0 ends at byte"),
    ],
)
def test_truncated_files_are_named(path, kept, message):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SourceError, match=rf"tiny\.gguf {message}|tiny\.gguf has a {message}"):
        GgufReader(path)


def test_corrupt_files_are_named(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\x09\0\0\0" + whole[8:])
    with pytest.raises(SourceError, match="GGUF version 9"):
        GgufReader(path)
    # The length of the first key, made absurd.
    path.write_bytes(whole[:24] + b"\xff" * 8 + whole[32:])
    with pytest.raises(SourceError, match="breaks off or is corrupt"):
        GgufReader(path)
    at = whole.index(b"llama.block_count") + len("llama.block_count")
    path.write_bytes(whole[:at] + b"\x63" + whole[at + 1 :])
    with pytest.raises(SourceError, match="breaks off or is corrupt"):
        GgufReader(path)


def test_an_unknown_quantisation_is_named(path):
    whole = path.read_bytes()
    at = whole.rindex(b"Q8_0") + 4 + 4 + 16
    assert whole[at : at + 4] == b"\x08\0\0\0"
    path.write_bytes(whole[:at] + b"\xfe\0\0\0" + whole[at + 4 :])
    with pytest.raises(SourceError, match="Q8_0 is stored as GGML type 254"):
        GgufReader(path)


def test_without_the_gguf_package(tmp_path, monkeypatch):
    quantised = write(tmp_path / "q.gguf")
    plain = write(tmp_path / "f.gguf", ["F32", "F16"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert GgufReader(plain).read("F16").dtype == torch.float16
    with pytest.raises(MissingDependencyError, match=r"pip install 'fastlens-interp\[gguf\]'"):
        GgufReader(quantised)


def test_rows_and_reading_on_a_device(path):
    reader = GgufReader(path)
    for name, shape in reader.shapes.items():
        whole = reader.read(name)
        on = reader.read_on(name, None, torch.device("cpu"))
        assert on.dtype == whole.dtype
        assert torch.equal(on, whole), name
        out = torch.empty(shape, dtype=whole.dtype)
        assert reader.read(name, None, out) is out
        assert torch.equal(out, whole)
        rows = torch.tensor([0, 1, shape[0] - 1])
        assert torch.equal(reader.read_rows(name, rows), whole[rows])
        assert torch.equal(reader.read_rows(name, rows, torch.bfloat16), whole[rows].bfloat16())
        assert reader.read_rows(name, rows[:0]).shape == (0, shape[1])
