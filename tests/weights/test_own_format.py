"""TransformerLens' own format: configs and safe reading. Whole models: families/test_neel.py."""

import pickle

import pytest
import torch

from fastlens.errors import SourceError
from fastlens.weights.own_format import OldLayout, as_family_config, biases, is_own, own_reader
from fastlens.weights.source import open_source
from fastlens.weights.tensor_files import LiveReader
from tests.weights.toys import RUN, SIZES, random_weights, save_toy

CONFIG = {**SIZES, **RUN, "attn_only": True}


def test_whose_config_it_is():
    assert is_own(CONFIG)
    assert not is_own({**CONFIG, "model_type": "gpt2"})
    assert not is_own({key: value for key, value in CONFIG.items() if key != "d_head"})
    theirs = {"architectures": ["GPT2LMHeadModel"], "n_embd": 3}
    assert as_family_config(theirs, "x") is theirs


def test_what_the_run_was_is_left_out():
    config = as_family_config({**CONFIG, "tokenizer_name": "x/y", "d_mlp": None}, "Toy")
    assert config["architectures"] == ["neel"]
    assert as_family_config(CONFIG, "SoLU_1L_v9_old")["architectures"] == ["neel-solu-old"]
    named = {**CONFIG, "architecture": "mingpt"}
    assert as_family_config(named, "SoLU_1L_v9_old")["architectures"] == ["mingpt"]
    assert not {"seed", "n_params", "lr_hidden", "version", "n_devices"} & set(config)
    assert {"n_ctx", "ln_eps", "normalization", "neuron_temp", "tokenizer_name"} <= set(config)


def test_which_biases_there_are():
    names = ["blocks.0.attn.b_Q", "blocks.1.attn.b_Q", "blocks.0.ln1.b", "ln_final.w"]
    assert biases([*names, "unembed.b_U", "blocks.0.attn.W_Q"]) == [
        "attn.b_Q", "ln1.b", "unembed.b_U",
    ]  # fmt: skip


def test_old_tensors_are_turned():
    stored = {
        "pos_embed.W_pos": torch.randn(4, 6), "norm.w": torch.randn(4),
        "blocks.0.attn.W_Q": torch.randn(2, 3, 4), "blocks.0.norm1.w": torch.randn(4),
    }  # fmt: skip
    reader = OldLayout(LiveReader(stored), 8)
    assert reader.shapes == {
        "pos_embed.W_pos": (6, 4), "ln_final.w": (4,), "blocks.0.attn.W_Q": (2, 3, 4),
        "blocks.0.ln1.w": (4,),
    }  # fmt: skip
    assert torch.equal(reader.read("pos_embed.W_pos"), stored["pos_embed.W_pos"].T)
    reader = OldLayout(LiveReader(stored), 6)
    assert reader.shapes["blocks.0.attn.W_Q"] == (2, 4, 3)
    out = torch.empty(2, 4, 3, dtype=torch.float64)
    assert reader.read("blocks.0.attn.W_Q", torch.float64, out) is out
    assert torch.equal(out, stored["blocks.0.attn.W_Q"].mT.double())


def test_files(tmp_path):
    folder = save_toy(tmp_path, CONFIG, random_weights(CONFIG))
    config = as_family_config(CONFIG, "Toy")
    assert "unembed.W_U" in own_reader(folder, config, None).shapes
    assert "attn.b_Q" in config["biases"]
    with pytest.raises(SourceError, match=r"final\.pth was asked, but there is no such file"):
        own_reader(folder, config, "checkpoints/final.pth")
    (folder / "model_final.pth").unlink()
    with pytest.raises(SourceError, match=r"ends in final\.pth\. Found: config\.json"):
        open_source(folder)


def test_code_in_a_file_is_not_run(tmp_path):
    folder = save_toy(tmp_path, CONFIG, {})

    class Touch:
        def __reduce__(self):
            return (type(folder).touch, (folder / "was-run",))

    (folder / "model_final.pth").write_bytes(pickle.dumps({"embed.W_E": Touch()}, protocol=2))
    with pytest.raises(SourceError, match="nothing of it was executed"):
        open_source(folder)
    assert not (folder / "was-run").exists()


def test_the_tokenizer_is_another_repository(tmp_path):
    config = {**CONFIG, "tokenizer_name": "someone/tokenizer"}
    source = open_source(save_toy(tmp_path, config, random_weights(CONFIG)))
    assert source.config_fields()["tokenizer_name"] == "someone/tokenizer"
    with pytest.raises(SourceError, match="someone/tokenizer.*could not be reached"):
        source.tokenizer()
