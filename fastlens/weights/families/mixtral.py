"""Mixtral: Mistral with a mixture of experts for its MLP."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama
from fastlens.weights.family import Key
from fastlens.weights.views import each_expert, gates_and_ups
from fastlens.weights.windows import all_windowed, window_fields

_BLOCK = "blocks.{l}.mlp."
_EXPERT = _BLOCK + "experts.{e}."
# Only say how a router is trained.
TRAINING = frozenset({"output_router_logits", "router_aux_loss_coef"})


def routed(keys: Mapping[str, Key | None]) -> dict[str, Key | None]:
    """Llama's tensors without those of its MLP."""
    return {name: key for name, key in keys.items() if not name.startswith(llama.M)}


def expert_keys(
    module: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, Key | None]:
    """The experts' tensors in files (one each) and in transformers' memory (one for all).

    Args:
        module: What the layer calls its mixture.
        names: Of an expert's gate, up and down projection.
    """
    gate, up, down = (f"layers.{{l}}.{module}.experts.{{e}}.{name}.weight" for name in names)
    return {
        gate: Key("d_mlp d_model", _EXPERT + "W_gate.weight"),
        up: Key("d_mlp d_model", _EXPERT + "W_in.weight"),
        down: Key("d_model d_mlp", _EXPERT + "W_out.weight"),
    }


def fused_keys(gate_up: str, down: str) -> dict[str, Key | None]:
    """All experts' tensors in one, by their names within the layer."""
    both = _EXPERT + "W_gate.weight", _EXPERT + "W_in.weight"
    return {
        f"layers.{{l}}.{gate_up}": Key("experts d_mlp+d_mlp d_model", both, gates_and_ups),
        f"layers.{{l}}.{down}": Key("experts d_model d_mlp", _EXPERT + "W_out.weight", each_expert),
    }


def router_key(name: str) -> dict[str, Key | None]:
    """The router's tensor, by its name within the layer."""
    return {f"layers.{{l}}.{name}": Key("experts d_model", _BLOCK + "W_gate.weight")}


# As most families name them.
EXPERTS = {
    **router_key("mlp.gate.weight"),
    **expert_keys("mlp"),
    **fused_keys("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
}


def always_grouped(config: dict[str, Any]) -> dict[str, Any]:
    """Llama's fields, with grouped heads even where there is a group a head, as TransformerLens."""
    fields = llama.heads_and_rotary(config)
    kv_heads = fields["n_key_value_heads"] or config.get("num_attention_heads", 32)
    return {**fields, "n_key_value_heads": kv_heads}


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 8, "max_position_embeddings": 131072, **config}
    if not (config.get("rope_parameters") or config.get("rope_theta")):
        config["rope_theta"] = 1e6
    fields, window = always_grouped(config), config.get("sliding_window")
    kinds = all_windowed(window, config.get("num_hidden_layers", 32))
    return {**fields, **window_fields(window, kinds, fields)}


FAMILY = replace(
    llama.FAMILY,
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    config_class="MixtralConfig",
    config={
        **llama.CONFIG,
        "intermediate_size": ("d_mlp", 14336),
        "max_position_embeddings": ("n_ctx", 131072),
        "rms_norm_eps": ("eps", 1e-5),
        "num_local_experts": ("num_experts", 8),
        "num_experts_per_tok": ("experts_per_token", 2),
    },
    # Its router always makes the chosen experts' weights sum to one.
    fixed={**llama.FAMILY.fixed, "norm_topk_prob": True},
    derive=_derive,
    reads=llama.FAMILY.reads | {"sliding_window"},
    only={},
    switches={},
    ignored=TRAINING | {"attention_dropout", "router_jitter_noise"},
    keys={
        **routed(llama.keys()),
        **EXPERTS,
        **router_key("block_sparse_moe.gate.weight"),
        **expert_keys("block_sparse_moe", ("w1", "w3", "w2")),
    },
    aliases={
        **dict.fromkeys(("mixtral", "mixtral-8x7b"), "mistralai/Mixtral-8x7B-v0.1"),
        **dict.fromkeys(
            ("mixtral-instruct", "mixtral-8x7b-instruct"), "mistralai/Mixtral-8x7B-Instruct-v0.1"
        ),
    },
    repositories=("mistralai/Mixtral-8x22B-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
    gguf={},
)
