"""Youtu-LLM: DeepSeek-V3's attention in dense blocks."""

from dataclasses import replace
from typing import Any

from fastlens.weights import latents
from fastlens.weights.families import deepseek_v3

_DEFAULTS = {
    **deepseek_v3.DEFAULTS,
    "num_attention_heads": 16,
    "max_position_embeddings": 131072,
}


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return latents.attention_fields(config, _DEFAULTS)


FAMILY = replace(
    deepseek_v3.FAMILY,
    name="youtu",
    architectures=("YoutuForCausalLM",),
    config_class="YoutuConfig",
    config={
        **deepseek_v3.CONFIG,
        "vocab_size": ("d_vocab", 128256),
        "hidden_size": ("d_model", 2048),
        "intermediate_size": ("d_mlp", 6144),
        "num_hidden_layers": ("n_layers", 32),
        "num_attention_heads": ("n_heads", 16),
        "max_position_embeddings": ("n_ctx", 131072),
    },
    derive=_fields,
    ties_by_default=True,
    reads=latents.READS,
    only={},
    ignored=frozenset({"attention_dropout", "embedding_initializer_range"}),
    keys=latents.DENSE,
    repositories=("tencent/Youtu-LLM-2B", "tencent/Youtu-LLM-2B-Base"),
)
