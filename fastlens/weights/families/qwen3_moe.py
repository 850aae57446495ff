"""Qwen 3 with mixtures of experts (30B-A3B, 235B-A22B), every layer one."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama, mixtral, qwen3
from fastlens.weights.windows import all_windowed, window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {"hidden_size": 2048, "num_key_value_heads": 4, **config}
    fields = llama.heads_and_rotary({"max_position_embeddings": 32768, **config})
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    kinds = all_windowed(window, config.get("num_hidden_layers", 24))
    experts = config.get("num_local_experts") or config.get("num_experts", 128)
    return {**fields, **window_fields(window, kinds, fields), "num_experts": experts}


CONFIG = {
    **llama.CONFIG,
    "vocab_size": ("d_vocab", 151936),
    "hidden_size": ("d_model", 2048),
    "num_hidden_layers": ("n_layers", 24),
    "max_position_embeddings": ("n_ctx", 32768),
    "norm_topk_prob": ("norm_topk_prob", False),
}
del CONFIG["intermediate_size"]
# Layers without a mixture are refused: every layer has one if these have these values.
ALL_MIXTURES = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_SIZES = """30B-A3B 30B-A3B-Base 235B-A22B 30B-A3B-Instruct-2507 30B-A3B-Thinking-2507
235B-A22B-Instruct-2507""".split()

FAMILY = replace(
    qwen3.FAMILY,
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    config_class="Qwen3MoeConfig",
    config={
        **CONFIG,
        "moe_intermediate_size": ("d_mlp", 768),
        "num_experts_per_tok": ("experts_per_token", 8),
    },
    derive=_derive,
    reads=llama.FAMILY.reads
    | {"use_sliding_window", "sliding_window", "num_experts", "num_local_experts"},
    only=ALL_MIXTURES,
    # intermediate_size is the width of layers without a mixture; Qwen 3's windows left a trace.
    ignored=mixtral.TRAINING | {"attention_dropout", "intermediate_size", "max_window_layers"},
    keys={
        **mixtral.routed(qwen3.FAMILY.keys),
        **mixtral.EXPERTS,
    },
    aliases={},
    repositories=(*(f"Qwen/Qwen3-{size}" for size in _SIZES), "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
)
