"""DeepSeek-V2, V2-Lite and Coder-V2: V3's attention, and a softmax router."""

from dataclasses import replace
from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.families import deepseek_v3
from fastlens.weights.late_mixtures import mixed_keys, mixture_fields
from fastlens.weights.latents import DENSE, attention_fields

_DEFAULTS = {
    **deepseek_v3.DEFAULTS,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "n_group": None,
    "topk_group": None,
    "routed_scaling_factor": 1.0,
}
_METHODS = ("greedy", "group_limited_greedy")


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    method = config.get("topk_method", "greedy")
    if method not in _METHODS:
        raise ConfigError(f"topk_method={method!r} was asked. Here it is one of {_METHODS}.")
    fields = mixture_fields(config, _DEFAULTS)
    if method == "greedy" and "num_experts" in fields:
        fields |= {"expert_groups": None, "groups_per_token": None}
    return {**attention_fields(config, _DEFAULTS), **fields}


FAMILY = replace(
    deepseek_v3.FAMILY,
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    config_class="DeepseekV2Config",
    config={
        "vocab_size": ("d_vocab", 102400),
        "hidden_size": ("d_model", 4096),
        "num_hidden_layers": ("n_layers", 32),
        "num_attention_heads": ("n_heads", 32),
        "hidden_act": ("act_fn", "silu"),
        "max_position_embeddings": ("n_ctx", 2048),
        "rms_norm_eps": ("eps", 1e-6),
    },
    derive=_fields,
    reads=(deepseek_v3.FAMILY.reads - {"rope_interleave"}) | {"topk_method"},
    # transformers does not look at norm_topk_prob here.
    only={
        "mlp_bias": False,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
    },
    keys=mixed_keys(DENSE, 0, has_bias=False),
    repositories=tuple(
        f"deepseek-ai/DeepSeek-{name}"
        for name in ("V2", "V2-Lite", "V2-Chat", "V2-Lite-Chat", "Coder-V2-Lite-Base",
                     "Coder-V2-Lite-Instruct")
    ),
)  # fmt: skip
