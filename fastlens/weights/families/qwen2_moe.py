"""Qwen 1.5 and 2 with mixtures of experts, and an expert that all tokens pass."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama, mixtral, qwen2, qwen3_moe
from fastlens.weights.family import Key
from fastlens.weights.windows import window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {"hidden_size": 2048, "num_attention_heads": 16, **config}
    fields = llama.heads_and_rotary({"max_position_embeddings": 32768, **config})
    is_on = bool(config.get("use_sliding_window"))
    # Every other layer of the first ones.
    last = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "sliding_attention" if is_on and layer % 2 == 0 and layer < last else "full_attention"
        for layer in range(config.get("num_hidden_layers", 24))
    ]
    window = config.get("sliding_window", 4096) if is_on else None
    return {**fields, **window_fields(window, kinds, fields)}


_SHARED, _OURS = llama.M + "shared_expert.", "blocks.{l}.mlp.shared_expert."

FAMILY = replace(
    qwen2.FAMILY,
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    config_class="Qwen2MoeConfig",
    config={
        **qwen3_moe.CONFIG,
        "num_attention_heads": ("n_heads", 16),
        "moe_intermediate_size": ("d_mlp", 1408),
        "shared_expert_intermediate_size": ("d_shared_expert", 5632),
        "num_experts": ("num_experts", 60),
        "num_experts_per_tok": ("experts_per_token", 4),
    },
    fixed={**llama.FAMILY.fixed, "gates_shared_expert": True},
    derive=_derive,
    only=qwen3_moe.ALL_MIXTURES,
    switches={"qkv_bias": True},
    ignored=mixtral.TRAINING | {"attention_dropout", "intermediate_size"},
    keys={
        **mixtral.routed(llama.keys("qkv_bias")),
        **mixtral.EXPERTS,
        _SHARED + "gate_proj.weight": Key("d_shared d_model", _OURS + "W_gate.weight"),
        _SHARED + "up_proj.weight": Key("d_shared d_model", _OURS + "W_in.weight"),
        _SHARED + "down_proj.weight": Key("d_model d_shared", _OURS + "W_out.weight"),
        llama.M + "shared_expert_gate.weight": Key(
            "1 d_model", "blocks.{l}.mlp.W_shared_gate.weight"
        ),
    },
    aliases={},
    repositories=tuple(
        f"Qwen/{name}"
        for name in ("Qwen1.5-MoE-A2.7B", "Qwen1.5-MoE-A2.7B-Chat", "Qwen2-57B-A14B",
                     "Qwen2-57B-A14B-Instruct")
    ),
)  # fmt: skip
