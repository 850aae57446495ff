"""StarCoder 1: one key-value head or one a head, against transformers."""

import pytest
import torch

from fastlens.errors import ConfigError
from fastlens.weights.families.gpt_bigcode import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import edit_config, weights_of
from tests.weights.families.generated import FamilyTests

TINY = {"vocab_size": 60, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
SHORT = {**TINY, "n_layer": 2}


class TestGptBigCode(FamilyTests):
    family = FAMILY
    cases = {
        "single": TINY,
        "full": {**SHORT, "multi_query": False, "n_inner": 40, "activation_function": "gelu"},
        "untied": {**SHORT, "tie_word_embeddings": False, "scale_attn_weights": False},
    }


def test_the_first_codes_settings_and_masks(tmp_path):
    model = TestGptBigCode.transformers_model("single")
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, inference_runner=0, validate_runner_input=True, pad_key_length=True)
    state = {**model.state_dict(), "transformer.bias": torch.ones(64, 64)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    old, new = open_source(tmp_path), open_source("x", hf_model=model)
    assert old.config_fields()["n_key_value_heads"] == 1
    assert weights_of(old).keys() == weights_of(new).keys()
    edit_config(tmp_path, add_cross_attention=True)
    with pytest.raises(ConfigError, match="add_cross_attention=True"):
        open_source(tmp_path)
