"""GLM-4.5 and 4.6: GLM's attention with half-split rotary channels, DeepSeek-V3's mixtures."""

from dataclasses import replace
from typing import Any

from fastlens.weights import late_mixtures
from fastlens.weights.families import deepseek_v3, llama, qwen3
from fastlens.weights.family import Key
from fastlens.weights.late_mixtures import mixed_keys, mixture_fields


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    fraction = config.get("partial_rotary_factor", 0.5)
    return {
        **llama.heads_and_rotary(config, fraction=fraction),
        **mixture_fields(config, _DEFAULTS),
        "router_scores": "sigmoid",
    }


_DEFAULTS = {
    "hidden_size": 4096,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "first_k_dense_replace": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
_QK_NORMS = {
    name: Key(key.axes, key.into, when="use_qk_norm") for name, key in qwen3.QK_NORMS.items()
}

FAMILY = replace(
    deepseek_v3.FAMILY,
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    config_class="Glm4MoeConfig",
    config={
        "vocab_size": ("d_vocab", 151552),
        "hidden_size": ("d_model", 4096),
        "num_hidden_layers": ("n_layers", 46),
        "num_attention_heads": ("n_heads", 96),
        "hidden_act": ("act_fn", "silu"),
        "max_position_embeddings": ("n_ctx", 131072),
        "rms_norm_eps": ("eps", 1e-5),
        "norm_topk_prob": ("norm_topk_prob", True),
        "use_qk_norm": ("use_qk_norm", False),
    },
    derive=_fields,
    reads=llama.FAMILY.reads | late_mixtures.READS | {"partial_rotary_factor"},
    only={},
    switches={llama.SWITCH: False, "use_qk_norm": False},
    keys=mixed_keys({**llama.keys(llama.SWITCH), **_QK_NORMS}, 1),
    repositories=("zai-org/GLM-4.5", "zai-org/GLM-4.5-Air", "zai-org/GLM-4.5-Air-Base",
                  "zai-org/GLM-4.6"),
    default_prepend_bos=False,
)  # fmt: skip
