"""DeepSeek-V3 and R1: latent attention, and experts in groups behind the first layers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.families import llama, mixtral
from fastlens.weights.family import Family, Key
from fastlens.weights.rope import ROTARY_ATTRIBUTES, rotary_fields
from fastlens.weights.views import output_heads, transposed


def attention_fields(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Sizes of latents and heads, rotary fields, and the softmax' scale."""
    config = {**defaults, **config}
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ConfigError(
            f"num_key_value_heads={kv_heads} was asked beside {heads} heads. Latent attention has "
            f"as many of both."
        )
    rotary = config["qk_rope_head_dim"]
    d_head = config["qk_nope_head_dim"] + rotary
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    growth = (rope.get("mscale_all_dim") or 0) if scaled else 0
    mscale = 0.1 * growth * math.log(max(rope["factor"], 1)) + 1.0 if growth else 1.0
    return {
        "d_head": d_head,
        "d_value": config["v_head_dim"] or config["hidden_size"] // heads,
        "d_q_latent": config["q_lora_rank"],
        "d_kv_latent": config["kv_lora_rank"],
        "attn_scale": math.sqrt(d_head) / mscale**2,
        **rotary_fields(config, rotary, config["max_position_embeddings"]),
        "rotary_adjacent_pairs": bool(config["rope_interleave"]),
    }


def rotated_first(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """Queries' weights with the channels that are rotated first; DeepSeek has them last."""
    assert cfg.rotary_dim is not None
    heads = tensor.view(cfg.n_heads, cfg.d_head, -1)
    passing = cfg.d_head - cfg.rotary_dim
    return torch.cat([heads[:, passing:], heads[:, :passing]], 1).transpose(1, 2)


def keys_and_values(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, Tensor]:
    """``[(head, key + value), latent]``: the keys' channels that are not rotated, then values."""
    assert cfg.rotary_dim is not None
    heads = tensor.view(cfg.n_heads, -1, tensor.shape[1]).transpose(1, 2)
    passing = cfg.d_head - cfg.rotary_dim
    return heads[..., :passing], heads[..., passing:]


def latent_and_shared(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, Tensor]:
    """The latent's weights or biases, and those of the rotated key that all heads share."""
    latent, shared = tensor[: cfg.d_kv_latent], tensor[cfg.d_kv_latent :]
    return (latent.t(), shared.t()) if tensor.ndim == 2 else (latent, shared)


def _has_q_latent(config: dict[str, Any]) -> bool:
    return config.get("q_lora_rank", 1536) is not None


def _has_q_bias(config: dict[str, Any]) -> bool:
    return _has_q_latent(config) and bool(config.get(SWITCH, False))


def first_dense(default: int) -> Callable[[dict[str, Any], int], bool]:
    """Whether a layer is one of the first, which have no mixture."""
    return lambda config, layer: layer < (config.get("first_k_dense_replace", default) or 0)


def mixture_fields(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The mixtures of the layers behind the first; no such fields if all layers are dense."""
    config = {**defaults, **config}
    dense, d_mlp = config["first_k_dense_replace"] or 0, config["intermediate_size"]
    if dense >= config["num_hidden_layers"]:
        return {"d_mlp": d_mlp, "d_mlp_dense": d_mlp}
    width = config["moe_intermediate_size"]
    return {
        "d_mlp": width,
        "d_mlp_dense": d_mlp,
        "n_dense_layers": dense,
        "num_experts": config["n_routed_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "d_shared_expert": width * (config["n_shared_experts"] or 0) or None,
        "expert_groups": config["n_group"],
        "groups_per_token": config["topk_group"],
        "expert_weight_scale": config["routed_scaling_factor"],
    }


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **attention_fields(config, DEFAULTS),
        **mixture_fields(config, DEFAULTS),
        "router_scores": "sigmoid",
    }


SWITCH = "attention_bias"
A, T = "layers.{l}.self_attn.", "blocks.{l}.attn."
ATTENTION = {
    A + "q_proj.weight": Key("heads d_model", T + "W_Q", rotated_first,
                             lambda config: not _has_q_latent(config)),
    A + "q_a_proj.weight": Key("d_q_latent d_model", T + "W_QA", transposed, _has_q_latent),
    A + "q_a_proj.bias": Key("d_q_latent", T + "b_QA", when=_has_q_bias),
    A + "q_a_layernorm.weight": Key("d_q_latent", T + "q_a_norm.w", when=_has_q_latent),
    A + "q_b_proj.weight": Key("heads d_q_latent", T + "W_QB", rotated_first, _has_q_latent),
    A + "kv_a_proj_with_mqa.weight": Key("d_kv_latent+rotary d_model", (T + "W_KVA", T + "W_KR"),
                                         latent_and_shared),
    A + "kv_a_proj_with_mqa.bias": Key("d_kv_latent+rotary", (T + "b_KVA", T + "b_KR"),
                                       latent_and_shared, SWITCH),
    A + "kv_a_layernorm.weight": Key("d_kv_latent", T + "kv_a_norm.w"),
    A + "kv_b_proj.weight": Key("nope+values d_kv_latent", (T + "W_KB", T + "W_VB"),
                                keys_and_values),
    A + "o_proj.weight": Key("d_model values", T + "W_O", output_heads),
    A + "o_proj.bias": Key("d_model", T + "b_O", when=SWITCH),
}  # fmt: skip
# Blocks that are dense throughout.
DENSE = {name: key for name, key in llama.keys().items() if "self_attn" not in name} | ATTENTION
_SHARED = "blocks.{l}.mlp.shared_expert."


def mixed_keys(dense: Mapping[str, Key | None], default: int, has_bias: bool = True) -> Any:
    """The keys of dense blocks, and of mixtures behind the first layers.

    Args:
        default: How many layers are dense if the config does not say.
        has_bias: Whether the router has a bias for the choice.
    """
    is_dense = first_dense(default)
    first = {
        name: replace(key, axes=key.axes.replace("d_mlp", "d_mlp_dense"), in_layer=is_dense)
        for name, key in dense.items()
        if key is not None and name.startswith(llama.M)
    }
    mixtures = {
        **mixtral.EXPERTS,
        **{llama.M + f"shared_experts.{theirs}_proj.weight": Key(axes, f"{_SHARED}{ours}.weight")
           for theirs, ours, axes in (("gate", "W_gate", "d_shared d_model"),
                                      ("up", "W_in", "d_shared d_model"),
                                      ("down", "W_out", "d_model d_shared"))},
    }  # fmt: skip
    if has_bias:
        bias = Key("experts", "blocks.{l}.mlp.b_choice")
        mixtures[llama.M + "gate.e_score_correction_bias"] = bias
    behind = {
        name: key and replace(key, in_layer=lambda config, layer: not is_dense(config, layer))
        for name, key in mixtures.items()
    }
    return {**dense, **first, **behind}


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
# How DeepSeek trained, and modules behind the model that predict further tokens.
TRAINING = mixtral.TRAINING | set(
    """attention_dropout pretraining_tp num_nextn_predict_layers num_mtp_layers aux_loss_alpha
    seq_aux ep_size""".split()
)
READS = ROTARY_ATTRIBUTES | set(
    """qk_rope_head_dim qk_nope_head_dim v_head_dim q_lora_rank kv_lora_rank rope_interleave
    num_key_value_heads head_dim qk_head_dim""".split()
)
MIXTURE_READS = frozenset(
    """intermediate_size moe_intermediate_size first_k_dense_replace n_routed_experts
    n_shared_experts num_experts_per_tok n_group topk_group routed_scaling_factor""".split()
)

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
    # head_dim and qk_head_dim follow from the two parts of a head.
    reads=READS | MIXTURE_READS,
    only={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    switches={SWITCH: False},
    ignored=TRAINING,
    keys=mixed_keys(DENSE, 3),
    layers_behind=("num_nextn_predict_layers", "num_mtp_layers"),
    repositories=("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"),
)
