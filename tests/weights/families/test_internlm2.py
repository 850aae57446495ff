"""InternLM 2: its code is not in transformers, whose Llama computes the same, repacked."""

import pytest
import torch

from fastlens.errors import ConfigError, ShapeError
from fastlens.weights.families.internlm2 import FAMILY
from tests.weights.families.generated import tokens_of
from tests.weights.families.repacked import check, save

CONFIG = {
    "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "attn_implementation":
    "eager", "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForCausalLM"}, "bias": False,
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
}  # fmt: skip
NAMES = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
         "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
         "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
         "embed_tokens": "tok_embeddings", "lm_head": "output"}  # fmt: skip


def repack(llama: dict) -> dict:
    """Each group's queries, then its key, then its value, as the remote code splits them."""
    out = {}
    for name, tensor in llama.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        out[name] = tensor
    for layer in range(2):
        at = f"model.layers.{layer}."
        q, k, v = (out.pop(f"{at}self_attn.{x}_proj.weight") for x in "qkv")
        kv_heads = len(k) // 8
        groups = [t.view(kv_heads, -1, 8, 32) for t in (q, k, v)]
        out[f"{at}attention.wqkv.weight"] = torch.cat(groups, 1).reshape(-1, 32)
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_against_llama(kv_heads, tmp_path):
    config = {**CONFIG, "num_key_value_heads": kv_heads}
    changes = {"num_key_value_heads": kv_heads, "rope_theta": 1000.0}
    model = check(save(tmp_path, config, repack, **changes), **changes)
    assert model.cfg.use_dynamic_ntk_rope and model.cfg.train_seq_length == 64
    with pytest.raises(ShapeError, match="65 tokens was given to a model trained on 64"):
        model(tokens_of(1, 65))


def test_what_is_not_accounted_for():
    assert "use_dynamic_ntk_rope" not in FAMILY.config_fields({**CONFIG, "rope_scaling": None})
    for stated in ({"bias": True}, {"head_dim": 8}):
        with pytest.raises(ConfigError, match=next(iter(stated))):
            FAMILY.config_fields({**CONFIG, **stated})
