"""ERNIE 4.5 (dense): Llama whose rotary pairs are neighbouring channels."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    return {**llama.heads_and_rotary({**_DEFAULTS, **config}), "rotary_adjacent_pairs": True}


_DEFAULTS = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 2,
             "head_dim": 128, "max_position_embeddings": 131072,
             "rope_theta": 500000.0}  # fmt: skip
SWITCH = "use_bias"

FAMILY = replace(
    llama.FAMILY,
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM",),
    config_class="Ernie4_5Config",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 103424),
        "hidden_size": ("d_model", 1024),
        "intermediate_size": ("d_mlp", 3072),
        "num_hidden_layers": ("n_layers", 18),
        "num_attention_heads": ("n_heads", 16),
        "max_position_embeddings": ("n_ctx", 131072),
        "rms_norm_eps": ("eps", 1e-5),
    },
    derive=_derive,
    ties_by_default=True,
    only={"compression_ratio": 1.0, "moe_num_experts": 0},
    switches={SWITCH: False},
    ignored=frozenset({"attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"}),
    keys=llama.keys(SWITCH, SWITCH, SWITCH),
    aliases={},
    repositories=("baidu/ERNIE-4.5-0.3B-PT", "baidu/ERNIE-4.5-0.3B-Base-PT"),
    default_prepend_bos=False,
    gguf={},
)
