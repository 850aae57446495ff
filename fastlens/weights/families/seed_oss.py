"""Seed-OSS: Llama with biases on queries, keys and values, and one on the output by switch."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    return llama.heads_and_rotary({**_DEFAULTS, **config})


_DEFAULTS = {"num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128,
             "max_position_embeddings": 524288}  # fmt: skip

FAMILY = replace(
    llama.FAMILY,
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    config_class="SeedOssConfig",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 155136),
        "intermediate_size": ("d_mlp", 27648),
        "num_hidden_layers": ("n_layers", 64),
        "num_attention_heads": ("n_heads", 80),
        "max_position_embeddings": ("n_ctx", 524288),
    },
    derive=_derive,
    only={},
    switches={llama.SWITCH: True, "attention_out_bias": False, "mlp_bias": False},
    ignored=frozenset({"attention_dropout", "residual_dropout", "pretraining_tp"}),
    keys=llama.keys(llama.SWITCH, "attention_out_bias", "mlp_bias"),
    aliases={},
    repositories=("ByteDance-Seed/Seed-OSS-36B-Base", "ByteDance-Seed/Seed-OSS-36B-Instruct"),
    default_prepend_bos=False,
    gguf={},
)
