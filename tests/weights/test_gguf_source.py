"""GGUF in Hugging Face's terms: what is refused, and rotary tables of Llama 3."""

import pytest
import torch

from fastlens.errors import ConfigError, SourceError, WeightsError
from fastlens.weights.gguf_source import open_gguf
from fastlens.weights.source import open_source
from tests.weights.checkpoints import hf_model, weights_of, write_gguf

gguf = pytest.importorskip("gguf")


def test_config_and_names(tmp_path):
    family, config, tensors, metadata = open_gguf(write_gguf(tmp_path / "a.gguf", "llama_grouped"))
    assert family.name == "llama" and metadata["general.architecture"] == "llama"
    assert config["num_key_value_heads"] == 2 and config["vocab_size"] == 60
    assert config["tie_word_embeddings"] is False
    state = hf_model("llama_grouped").state_dict()
    prefix = family.prefix
    assert {prefix + n if n != "lm_head.weight" else n for n in tensors.shapes} == set(state)
    assert torch.equal(
        tensors.read("layers.2.self_attn.k_proj.weight"),
        state["model.layers.2.self_attn.k_proj.weight"],
    )


def test_quantised_tensors_are_dequantised(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "llama_full", quantize="Q8_0")
    ours = weights_of(open_source(path))
    want = weights_of(open_source("x", hf_model=hf_model("llama_full")))
    for key, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert (tensor - want[key]).abs().max() <= 2e-3, key
    assert any(not torch.equal(ours[key], want[key]) for key in ours)


def test_unknown_architectures_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="'mamba'. fastlens can load gpt2, gptneox, llama"):
        open_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"logit_scale": 2.0}, ConfigError, r"does not account for: llama\.logit_scale=2\.0"),
        ({"attention.head_count": None}, SourceError, r"lacks llama\.attention\.head_count"),
        ({"rope.scaling.type": "longrope"}, ConfigError, "type 'longrope'"),
        ({"rope.scaling.yarn_log_multiplier": 1.0}, ConfigError, "yarn_log_multiplier"),
    ],
)
def test_metadata_that_would_be_lost_is_refused(tmp_path, metadata, error, message):
    path = write_gguf(tmp_path / "a.gguf", "llama_grouped", **metadata)
    with pytest.raises(error, match=message):
        open_gguf(path)


def rewrite(path, **tensors):
    """The same file with more tensors."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("more.gguf"), "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.copy())
    for name, tensor in tensors.items():
        writer.add_tensor(name.replace("__", "."), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("more.gguf")


def test_unknown_tensors_are_refused(tmp_path):
    router = {"blk__0__ffn_gate_inp__weight": torch.ones(2, 3)}
    path = rewrite(write_gguf(tmp_path / "a.gguf", "llama_grouped"), **router)
    with pytest.raises(WeightsError, match=r"for: blk\.0\.ffn_gate_inp\.weight \[2, 3\]"):
        open_gguf(path)


def llama3_table(factor: float, base: float) -> torch.Tensor:
    """rope_freqs as llama.cpp's converter writes them, frequency by frequency."""
    table = []
    for n in range(4):
        wavelength = 2 * torch.pi * base ** (n / 4)
        if wavelength < 8192 / 4:
            table.append(1.0)
        elif wavelength > 8192:
            table.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            table.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(table)


def test_the_rotary_table_of_llama_3(tmp_path):
    # Wavelengths of 6, 167, 4443 and 118,000: kept, kept, blended, divided.
    plain = write_gguf(tmp_path / "a.gguf", "llama_grouped", **{"rope.freq_base": 5e5})
    table = llama3_table(8.0, 5e5)
    assert table[1] == 1 and 1 < table[2] < 8 and table[3] == 8
    fields = open_source(rewrite(plain, rope_freqs__weight=table)).config_fields()
    assert fields["use_NTK_by_parts_rope"] and fields["NTK_by_parts_factor"] == 8.0
    assert fields["NTK_original_ctx_len"] == 8192
    with pytest.raises(ConfigError, match="not Llama 3's"):
        open_source(rewrite(plain, rope_freqs__weight=table * 1.01))


def test_parts_of_a_split_file_are_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "llama_grouped")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="one of 3 parts"):
        open_gguf(tmp_path / "part.gguf")
    assert path.exists()
