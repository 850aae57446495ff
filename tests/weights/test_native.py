"""fastlens' own folder: written whole or not at all, read by the safetensors library too."""

import json

import pytest
import safetensors.torch
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, SourceError
from fastlens.weights.native import NativeTensors, is_native, save_native, write_safetensors
from tests.configs import tiny

CFG = HookedTransformerConfig(**tiny("local", dtype=torch.bfloat16))
TENSORS = {"embed.W_E": torch.randn(4, 3).t(), "blocks.0.attn.b_Q": torch.ones(2)}


def test_the_folder(tmp_path):
    folder = tmp_path / "new" / "model"
    assert not is_native(folder)
    save_native(folder, CFG, TENSORS.items())
    assert is_native(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["fastlens.json", "model.safetensors"]
    fields = json.loads((folder / "fastlens.json").read_text())
    assert fields["dtype"] == "bfloat16" and fields["attn_types"] == ["global", "local"]
    assert not {"device", "seed", "init_weights", "n_params", "n_devices"} & set(fields)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in TENSORS.items())


def test_reading_back(tmp_path):
    save_native(tmp_path, CFG, TENSORS.items())
    native = NativeTensors(tmp_path)
    again = HookedTransformerConfig(**native.fields, device="cpu")
    different = {name for name, value in CFG.to_dict().items() if getattr(again, name) != value}
    assert different == {"seed"}
    assert native.shapes == {"embed.W_E": (3, 4), "blocks.0.attn.b_Q": (2,)}
    assert torch.equal(native.group("embed", None)["embed.W_E"], TENSORS["embed.W_E"])
    assert list(native.group("blocks.0", torch.float64)) == ["blocks.0.attn.b_Q"]
    assert native.group("unembed", None) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 2).to(dtype), "b": torch.randn(()).to(dtype)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    stored = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(SourceError, match="dtype torch.int64"):
        write_safetensors(tmp_path / "y.safetensors", {"a": torch.ones(1, dtype=torch.int64)})


def test_a_broken_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(2)})
    before = path.read_bytes()

    class Broken(torch.Tensor):
        def detach(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, {"a": torch.zeros(2), "b": torch.zeros(2).as_subclass(Broken)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be saved to .*file"):
        save_native(tmp_path / "file" / "below", CFG, TENSORS.items())


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"dtype": "float99"}', '{"dtype": 3}'])
def test_broken_configs_are_named(tmp_path, text):
    save_native(tmp_path, CFG, TENSORS.items())
    (tmp_path / "fastlens.json").write_text(text)
    with pytest.raises(ConfigError, match=r"fastlens\.json is not a model's config"):
        NativeTensors(tmp_path)


def test_missing_weights_are_named(tmp_path):
    save_native(tmp_path, CFG, TENSORS.items())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has fastlens\.json but no model\.safetensors"):
        NativeTensors(tmp_path)
