"""OLMoE: a mixture of experts, and one RMS norm over the queries (and keys) of all heads."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama, mixtral
from fastlens.weights.family import Key


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {"hidden_size": 2048, "num_attention_heads": 16, **config}
    return mixtral.always_grouped({"max_position_embeddings": 4096, **config})


FAMILY = replace(
    mixtral.FAMILY,
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    config_class="OlmoeConfig",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 50304),
        "hidden_size": ("d_model", 2048),
        "intermediate_size": ("d_mlp", 2048),
        "num_hidden_layers": ("n_layers", 16),
        "num_attention_heads": ("n_heads", 16),
        "max_position_embeddings": ("n_ctx", 4096),
        "rms_norm_eps": ("eps", 1e-5),
        "num_experts": ("num_experts", 64),
        "num_experts_per_tok": ("experts_per_token", 8),
        "norm_topk_prob": ("norm_topk_prob", False),
        "clip_qkv": ("clip_qkv", None),
    },
    fixed={**llama.FAMILY.fixed, "use_qk_norm": True, "qk_norm_kind": "joined"},
    derive=_derive,
    reads=llama.FAMILY.reads,
    switches={llama.SWITCH: False},
    ignored=mixtral.TRAINING | {"attention_dropout"},
    keys={
        **mixtral.routed(llama.keys(llama.SWITCH, llama.SWITCH)),
        **mixtral.EXPERTS,
        llama.A + "q_norm.weight": Key("heads", "blocks.{l}.attn.q_norm.w"),
        llama.A + "k_norm.weight": Key("kv_heads", "blocks.{l}.attn.k_norm.w"),
    },
    aliases={"olmoe": "allenai/OLMoE-1B-7B-0924"},
    repositories=("allenai/OLMoE-1B-7B-0924-Instruct", "allenai/OLMoE-1B-7B-0125"),
)
