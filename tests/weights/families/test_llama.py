"""Llama: names, shapes and values against transformers and TransformerLens."""

import copy
import json

import pytest
import torch

from fastlens.errors import ConfigError, WeightsError
from fastlens.weights.families.llama import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import CASES, cases_of, hf_model, save_folder, weights_of, write_gguf
from tests.weights.families.facts import (
    check_aliases,
    check_same_as_transformerlens,
)
from tests.weights.families.generated import FamilyTests


class TestLlama(FamilyTests):
    family = FAMILY
    cases = cases_of(FAMILY.name)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "llama-7b", "llama-2", "llama-3", "codellama", "yi-") > 38


@pytest.mark.tl
@pytest.mark.parametrize("case", ["llama_full", "llama_grouped", "llama_single"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    check_same_as_transformerlens(case, convert_llama_weights)


def test_config_fields():
    fields = open_source("x", hf_model=hf_model("llama_grouped")).config_fields()
    wanted = {
        "d_model": 32, "d_head": 8, "n_heads": 4, "n_key_value_heads": 2, "n_layers": 3,
        "n_ctx": 64, "d_mlp": 48, "d_vocab": 60, "act_fn": "silu", "eps": 1e-6, "gated_mlp": True,
        "normalization_type": "RMS", "final_rms": True, "positional_embedding_type": "rotary",
        "rotary_base": 10000.0, "rotary_dim": 8, "rotary_adjacent_pairs": False,
        "original_architecture": "LlamaForCausalLM", "default_prepend_bos": True,
        "model_name": "x", "tokenizer_name": None,
    }  # fmt: skip
    assert fields == wanted
    full = open_source("x", hf_model=hf_model("llama_full")).config_fields()
    assert full["n_key_value_heads"] is None
    assert open_source("x", hf_model=hf_model("llama_head_dim")).config_fields()["d_head"] == 12


def test_gate_biases_are_refused_unless_zero():
    model = copy.deepcopy(hf_model("llama_mlp_bias"))
    assert "blocks.2.mlp.b_out" in weights_of(open_source("x", hf_model=model))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.bias[0] = 1.0
    with pytest.raises(WeightsError, match="gate and up projections .* not zero"):
        weights_of(open_source("x", hf_model=model))


GGUF_CASES = ["llama_full", "llama_grouped", "llama_single", "llama_tied", "llama_biased"]


@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf(case, tmp_path):
    pytest.importorskip("gguf")
    ours = open_source(write_gguf(tmp_path / "tiny.gguf", case))
    theirs = open_source("x", hf_model=hf_model(case))
    want = weights_of(theirs)
    for key, tensor in weights_of(ours).items():
        assert torch.equal(tensor, want.pop(key)), key
    assert not want
    skip = ("model_name", "tokenizer_name", "eps")
    fields = {k: v for k, v in ours.config_fields().items() if k not in skip}
    assert fields.items() <= theirs.config_fields().items()


def test_gguf_linear_scaling(tmp_path):
    pytest.importorskip("gguf")
    path = write_gguf(
        tmp_path / "tiny.gguf", "llama_linear",
        **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    )  # fmt: skip
    assert open_source(path).config_fields()["rotary_scaling_factor"] == 4.0


def test_gguf_refuses_sizes_llama_does_not_have(tmp_path):
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "tiny.gguf", "llama_full", **{"attention.value_length": 4})
    with pytest.raises(ConfigError, match="different sizes"):
        open_source(path)
    path = write_gguf(tmp_path / "moe.gguf", "llama_full", expert_count=8)
    with pytest.raises(ConfigError, match=r"does not account for: llama\.expert_count=8"):
        open_source(path)


@pytest.mark.parametrize("case", ["llama_llama3", "llama_linear", "llama_yarn"])
def test_rope_keys_of_older_transformers(case, tmp_path):
    """``rope_theta`` and ``rope_scaling`` beside each other, and ``type`` for ``rope_type``."""
    rope = dict(CASES[case][2]["rope_parameters"])
    theta = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    folder = save_folder(tmp_path, case, rope_parameters=None, rope_theta=theta, rope_scaling=rope)
    assert "rope_parameters" not in json.loads((folder / "config.json").read_text())
    old = open_source(folder).config_fields()
    new = open_source("x", hf_model=hf_model(case)).config_fields()
    assert old == {**new, "model_name": old["model_name"]}


def test_every_published_llama_config_is_accounted_for(tmp_path):
    """The keys of real config.json files, across releases."""
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    published = [
        # Llama 2 7B
        {"pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False,
         "torch_dtype": "float16", "use_cache": True, "transformers_version": "4.31.0.dev0"},
        # Llama 3.1 8B
        {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
         "rope_theta": 500000.0, "rope_scaling": llama3, "eos_token_id": [128001, 128008]},
        # SmolLM2 135M
        {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000,
         "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ]  # fmt: skip
    for number, extra in enumerate(published):
        folder = tmp_path / str(number)
        save_folder(folder, "llama_grouped", rope_parameters=None, **extra)
        assert open_source(folder).config_fields()["d_model"] == 32
