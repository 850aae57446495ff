"""dots.llm1: Qwen 3's attention, DeepSeek-V3's mixtures."""

from dataclasses import replace
from typing import Any

from fastlens.weights import late_mixtures
from fastlens.weights.families import deepseek_v3, llama, qwen3
from fastlens.weights.late_mixtures import mixed_keys, mixture_fields
from fastlens.weights.windows import window_fields


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    fields, window = llama.heads_and_rotary(config), config["sliding_window"]
    kinds = config.get("layer_types") or [
        "sliding_attention"
        if window is not None and layer >= config["max_window_layers"]
        else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    return {
        **fields,
        **window_fields(window, kinds, fields),
        **mixture_fields(config, _DEFAULTS),
        "router_scores": "sigmoid",
    }


_DEFAULTS = {
    "hidden_size": 4608,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "sliding_window": 4096,
    "max_window_layers": 62,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 62,
    "first_k_dense_replace": 0,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "num_experts_per_tok": None,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}

FAMILY = replace(
    deepseek_v3.FAMILY,
    name="dots1",
    architectures=("Dots1ForCausalLM",),
    config_class="Dots1Config",
    config={
        "vocab_size": ("d_vocab", 152064),
        "hidden_size": ("d_model", 4608),
        "num_hidden_layers": ("n_layers", 62),
        "num_attention_heads": ("n_heads", 32),
        "hidden_act": ("act_fn", "silu"),
        "max_position_embeddings": ("n_ctx", 2048),
        "rms_norm_eps": ("eps", 1e-6),
        "norm_topk_prob": ("norm_topk_prob", False),
    },
    fixed={**deepseek_v3.FAMILY.fixed, "use_qk_norm": True},
    derive=_fields,
    reads=llama.FAMILY.reads
    | late_mixtures.READS
    | {"sliding_window", "max_window_layers", "layer_types"},
    only={"scoring_func": "noaux_tc", "use_sliding_window": False},
    keys=mixed_keys(qwen3.FAMILY.keys, 0),
    layers_behind=(),
    repositories=("rednote-hilab/dots.llm1.base", "rednote-hilab/dots.llm1.inst"),
    default_prepend_bos=False,
)
