"""MiniCPM3: DeepSeek-V2's attention in dense blocks, with multipliers."""

import math
from dataclasses import replace
from typing import Any

from fastlens.weights import latents
from fastlens.weights.families import deepseek_v3

_DEFAULTS = {
    "num_attention_heads": 40,
    "hidden_size": 2560,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": None,
    "q_lora_rank": 768,
    "kv_lora_rank": 256,
    "max_position_embeddings": 32768,
    "rope_interleave": False,
}


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return latents.attention_fields(config, _DEFAULTS)


def _into_stream(config: dict[str, Any]) -> float:
    """What attention and MLP write is scaled for the number of layers."""
    depth, layers = config.get("scale_depth", 1.4), config.get("num_hidden_layers", 62)
    return 1.0 if depth is None else depth / math.sqrt(layers)


def _into_logits(config: dict[str, Any]) -> float:
    base, width = config.get("dim_model_base", 256), config.get("hidden_size", 2560)
    return 1.0 if base is None else base / width


_WRITERS = ("attn.W_O", "attn.b_O", "mlp.W_out")

FAMILY = replace(
    deepseek_v3.FAMILY,
    name="minicpm3",
    architectures=("MiniCPM3ForCausalLM",),
    config_class="MiniCPM3Config",
    config={
        **deepseek_v3.CONFIG,
        "vocab_size": ("d_vocab", 73448),
        "hidden_size": ("d_model", 2560),
        "intermediate_size": ("d_mlp", 6400),
        "num_hidden_layers": ("n_layers", 62),
        "num_attention_heads": ("n_heads", 40),
        "max_position_embeddings": ("n_ctx", 32768),
        "rms_norm_eps": ("eps", 1e-5),
    },
    derive=_fields,
    ties_by_default=True,
    reads=(latents.READS - {"rope_interleave"}) | {"scale_emb", "scale_depth", "dim_model_base"},
    only={"mlp_bias": False},
    ignored=frozenset({"attention_dropout", "pretraining_tp"}),
    keys=latents.DENSE,
    factors={
        "embed.W_E": lambda config: config.get("scale_emb", 12),
        **{f"blocks.{{l}}.{writer}": _into_stream for writer in _WRITERS},
        "unembed.W_U": _into_logits,
    },
    repositories=("openbmb/MiniCPM3-4B",),
)
