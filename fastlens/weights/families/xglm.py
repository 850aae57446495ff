"""XGLM: OPT's block, scaled embeddings, and sinusoidal positions that no checkpoint holds."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.families import opt
from fastlens.weights.family import Family, Key
from fastlens.weights.views import transposed


def sinusoids(cfg: HookedTransformerConfig, dtype: torch.dtype) -> Float[Tensor, "n_ctx d_model"]:
    """Rows 2 to ``n_ctx + 2`` of tensor2tensor's table: all sines, then all cosines."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    half = cfg.d_model // 2
    rates = torch.exp(torch.arange(half, dtype=wide) * -(math.log(10000) / (half - 1)))
    angles = torch.arange(2, cfg.n_ctx + 2, dtype=wide)[:, None] * rates
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(table, (0, cfg.d_model % 2)).to(dtype)


def _head_size(config: dict[str, Any]) -> dict[str, Any]:
    padding = config.get("pad_token_id", 1)
    if padding is not None and padding > 1:
        raise ConfigError(
            f"pad_token_id={padding} was found. transformers then gives text position "
            f"{padding - 2} a row of zeros, which fastlens does not; XGLM's own is 1."
        )
    return {"d_head": config.get("d_model", 1024) // config.get("attention_heads", 16)}


def embedding_scale(config: dict[str, Any], width: str) -> float:
    """What embeddings are multiplied with; the attribute ``width`` holds their width."""
    return math.sqrt(config.get(width, 1024)) if config.get("scale_embedding", True) else 1.0


FAMILY = Family(
    name="xglm",
    architectures=("XGLMForCausalLM",),
    config_class="XGLMConfig",
    prefix="model.",
    config={
        "vocab_size": ("d_vocab", 256008),
        "max_position_embeddings": ("n_ctx", 2048),
        "d_model": ("d_model", 1024),
        "ffn_dim": ("d_mlp", 4096),
        "num_layers": ("n_layers", 24),
        "attention_heads": ("n_heads", 16),
        "activation_function": ("act_fn", "gelu"),
    },
    fixed={"normalization_type": "LN", "eps": 1e-5},
    derive=_head_size,
    ties_by_default=True,
    reads=frozenset({"scale_embedding"}),
    only={"add_cross_attention": False},
    # No dropout in eval mode; a decoder alone starts with its prompt.
    ignored=frozenset(
        """dropout attention_dropout activation_dropout layerdrop init_std
        decoder_start_token_id""".split()
    ),
    keys={
        **opt.keys(),
        "layer_norm.weight": Key("d_model", "ln_final.w"),
        "layer_norm.bias": Key("d_model", "ln_final.b"),
        "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
        "embed_positions.weights": None,
    },
    factors={"embed.W_E": lambda config: embedding_scale(config, "d_model")},
    computed={"pos_embed.W_pos": sinusoids},
    repositories=tuple(
        f"facebook/xglm-{size}" for size in ("564M", "1.7B", "2.9B", "4.5B", "7.5B")
    ),
)
