"""OLMo 1: Llama with LayerNorms that have no parameters, and clipped queries, keys and values."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.weights.families import llama


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    # Every norm's epsilon is this one, whatever a config says.
    return {**llama.heads_and_rotary(config), "eps": 1e-5}


def _ones(cfg: HookedTransformerConfig, dtype: torch.dtype) -> Tensor:
    return torch.ones(cfg.d_model, dtype=dtype)


CONFIG = {
    **{name: field for name, field in llama.CONFIG.items() if name != "rms_norm_eps"},
    "vocab_size": ("d_vocab", 50304),
}
_ALIASES = {"olmo-1b": "allenai/OLMo-1B-hf", "olmo-7b": "allenai/OLMo-7B-hf"}

FAMILY = replace(
    llama.FAMILY,
    name="olmo",
    architectures=("OlmoForCausalLM",),
    config_class="OlmoConfig",
    config={**CONFIG, "clip_qkv": ("clip_qkv", None)},
    fixed={"normalization_type": "LN", "gated_mlp": True},
    derive=_derive,
    only={},
    switches={llama.SWITCH: False},
    keys={
        name: key
        for name, key in llama.keys(llama.SWITCH, llama.SWITCH).items()
        if not name.endswith("norm.weight")
    },
    # The gains that TransformerLens gives its norms.
    computed=dict.fromkeys(("blocks.{l}.ln1.w", "blocks.{l}.ln2.w", "ln_final.w"), _ones),
    aliases=_ALIASES,
    repositories=("allenai/OLMo-7B-0424-hf", "allenai/OLMo-7B-0724-hf", "allenai/OLMo-1B-0724-hf"),
    gguf={},
)
