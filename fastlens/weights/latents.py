"""What families with latent attention share: its config fields and its tensors."""

import math
from typing import Any

import torch
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.family import Key
from fastlens.weights.llama_like import SWITCH, A, keys
from fastlens.weights.rope import ROTARY_ATTRIBUTES, rotary_fields
from fastlens.weights.views import output_heads, transposed


def attention_fields(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Sizes of latents and heads, rotary fields, and the softmax' scale.

    Args:
        defaults: Of the family's config class, for what the config does not say.

    Raises: ConfigError for grouped heads.
    """
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


T = "blocks.{l}.attn."
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
DENSE = {name: key for name, key in keys().items() if "self_attn" not in name} | ATTENTION
# head_dim and qk_head_dim follow from the two parts of a head.
READS = ROTARY_ATTRIBUTES | set(
    """qk_rope_head_dim qk_nope_head_dim v_head_dim q_lora_rank kv_lora_rank rope_interleave
    num_key_value_heads head_dim qk_head_dim""".split()
)
