"""Baichuan 7B: its code is not in transformers, whose Llama computes the same, repacked."""

import pytest
import torch

from fastlens.errors import ConfigError
from fastlens.weights.families.baichuan import FAMILY
from tests.weights.families.repacked import check, save

CONFIG = {
    "architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu",
    "auto_map": {"AutoConfig": "configuration_baichuan.BaiChuanConfig"}, "rms_norm_eps": 1e-5,
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "model_max_length": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
FULL = {"num_key_value_heads": 4}


def repack(llama: dict) -> dict:
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn."
        parts = [llama.pop(f"{at}{x}_proj.weight") for x in "qkv"]
        llama[f"{at}W_pack.weight"] = torch.cat(parts)
        llama[f"{at}rotary_emb.inv_freq"] = torch.ones(4)
    return llama


def test_against_llama(tmp_path):
    model = check(save(tmp_path, CONFIG, repack, **FULL), **FULL)
    assert model.cfg.n_key_value_heads is None and model.cfg.rotary_base == 10000


@pytest.mark.parametrize(
    "stated", [{"max_position_embeddings": None}, {"vocab_size": 125696}, {"z_loss_weight": 0}]
)
def test_its_relatives_are_refused(stated):
    config = {key: v for key, v in {**CONFIG, **stated}.items() if v is not None}
    with pytest.raises(ConfigError, match=r"Baichuan 2 \(vocab|z_loss_weight"):
        FAMILY.config_fields(config)
