"""EXAONE 3: its code is not in transformers, whose Llama computes the same, repacked."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.exaone import FAMILY
from tests.weights.families.repacked import check, save
from tests.weights.families.tiny import LLAMA3

_SCALING = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
CONFIG = {
    "architectures": ["ExaoneForCausalLM"], "model_type": "exaone", "activation_function": "silu",
    "attention_dropout": 0.0, "embed_dropout": 0.0, "layer_norm_epsilon": 1e-5, "num_layers": 2,
    "auto_map": {"AutoConfig": "configuration_exaone.ExaoneConfig"}, "head_dim": 8,
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 1000.0,
    "rope_scaling": _SCALING, "tie_word_embeddings": False, "initializer_range": 0.02,
}  # fmt: skip
NAMES = {"model.layers": "transformer.h", "model.embed_tokens": "transformer.wte",
         "model.norm": "transformer.ln_f", "input_layernorm": "ln_1",
         "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.attention.out_proj",
         "self_attn": "attn.attention", "mlp.gate_proj": "mlp.c_fc_0", "mlp.up_proj": "mlp.c_fc_1",
         "mlp.down_proj": "mlp.c_proj"}  # fmt: skip


def repack(llama: dict) -> dict:
    out = {}
    for name, tensor in llama.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        out[name] = tensor
    return out


@pytest.mark.parametrize(("kv_heads", "tied"), [(1, False), (2, True), (4, False)])
def test_against_llama(kv_heads, tied, tmp_path):
    config = {**CONFIG, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    changes = {"num_key_value_heads": kv_heads, "rope_parameters": LLAMA3}

    def untied(tensors):
        # Tied checkpoints hold the embedding alone.
        return {k: v for k, v in repack(tensors).items() if not (tied and k == "lm_head.weight")}

    changes["tie_word_embeddings"] = tied
    model = check(save(tmp_path, config, untied, **changes), **changes)
    assert model.cfg.use_NTK_by_parts_rope and model.cfg.eps == 1e-5


def test_what_is_not_accounted_for():
    with pytest.raises(ConfigError, match="surprise=1"):
        FAMILY.config_fields({**CONFIG, "surprise": 1})
    short = FAMILY.config_fields({"num_layers": 3})
    assert (short["n_layers"], short["act_fn"]) == (3, "silu")
