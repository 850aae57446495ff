"""DeepSeek-V3 and R1: latent attention, and experts in groups behind the first layers."""

from typing import Any

from fastlens.weights import late_mixtures, latents
from fastlens.weights.family import Family
from fastlens.weights.late_mixtures import mixed_keys, mixture_fields
from fastlens.weights.llama_like import SWITCH


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **latents.attention_fields(config, DEFAULTS),
        **mixture_fields(config, DEFAULTS),
        "router_scores": "sigmoid",
    }


# transformers' defaults of what is not copied as it is.
DEFAULTS = {
    "num_attention_heads": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "max_position_embeddings": 4096,
    "rope_interleave": True,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}

CONFIG = {
    "vocab_size": ("d_vocab", 129280),
    "hidden_size": ("d_model", 7168),
    "intermediate_size": ("d_mlp", 18432),
    "num_hidden_layers": ("n_layers", 61),
    "num_attention_heads": ("n_heads", 128),
    "hidden_act": ("act_fn", "silu"),
    "max_position_embeddings": ("n_ctx", 4096),
    "rms_norm_eps": ("eps", 1e-6),
}

FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    config_class="DeepseekV3Config",
    prefix="model.",
    config={
        **{name: ours for name, ours in CONFIG.items() if name != "intermediate_size"},
        "norm_topk_prob": ("norm_topk_prob", True),
    },
    fixed={"normalization_type": "RMS", "final_rms": True, "gated_mlp": True},
    derive=_fields,
    reads=latents.READS | late_mixtures.READS,
    only={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    switches={SWITCH: False},
    ignored=late_mixtures.TRAINING,
    keys=mixed_keys(latents.DENSE, 3),
    layers_behind=("num_nextn_predict_layers", "num_mtp_layers"),
    repositories=("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"),
)
