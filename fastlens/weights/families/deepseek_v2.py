"""DeepSeek-V2, V2-Lite and Coder-V2: V3's attention under other defaults."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import deepseek_v3

_DEFAULTS = {
    **deepseek_v3.DEFAULTS,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    deepseek_v3.dense_only({"num_hidden_layers": 32, **config}, 0)
    return deepseek_v3.attention_fields(config, _DEFAULTS)


FAMILY = replace(
    deepseek_v3.FAMILY,
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    config_class="DeepseekV2Config",
    config={
        **deepseek_v3.CONFIG,
        "vocab_size": ("d_vocab", 102400),
        "hidden_size": ("d_model", 4096),
        "intermediate_size": ("d_mlp", 11008),
        "num_hidden_layers": ("n_layers", 32),
        "num_attention_heads": ("n_heads", 32),
        "max_position_embeddings": ("n_ctx", 2048),
    },
    derive=_fields,
    reads=deepseek_v3.FAMILY.reads - {"rope_interleave"},
    only={"mlp_bias": False},
    repositories=tuple(
        f"deepseek-ai/DeepSeek-{name}"
        for name in ("V2", "V2-Lite", "V2-Chat", "V2-Lite-Chat", "Coder-V2-Lite-Base",
                     "Coder-V2-Lite-Instruct")
    ),
)  # fmt: skip
