"""Baichuan 7B, first release: Llama whose q, k and v are one matrix (remote code)."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.families import llama
from fastlens.weights.family import Key
from fastlens.weights.rope import ROTARY_ATTRIBUTES
from fastlens.weights.views import input_heads


def _qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """``[(qkv head d_head), d_model]``."""
    return tuple(input_heads(part, cfg) for part in tensor.chunk(3))


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    """The 13B models and the second release share names with this one, but not their arithmetic."""
    vocabulary = config.get("vocab_size", 64000)
    if "max_position_embeddings" not in config or vocabulary == 125696:
        raise ConfigError(
            f"a Baichuan model with vocab_size={vocabulary} and max_position_embeddings="
            f"{config.get('max_position_embeddings')} was found. The 13B models (ALiBi, no "
            f"max_position_embeddings) and Baichuan 2 (vocabulary of 125696, whose unembedding is "
            f"normalised) are not read here. Baichuan-7B is."
        )
    return llama.heads_and_rotary(config)


_APART = {llama.A + f"{x}_proj.weight" for x in "qkv"}
_INTO = tuple(f"blocks.{{l}}.attn.W_{x}" for x in "QKV")
_PACKED: dict[str, Key | None] = {llama.A + "W_pack.weight": Key("qkv d_model", _INTO, _qkv)}

FAMILY = replace(
    llama.FAMILY,
    name="baichuan",
    architectures=("BaiChuanForCausalLM", "BaichuanForCausalLM"),
    config_class="PretrainedConfig",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 64000),
        "max_position_embeddings": ("n_ctx", 4096),
    },
    derive=_derive,
    reads=ROTARY_ATTRIBUTES,
    only={},
    switches={},
    ignored=frozenset({"model_max_length"}),
    keys={name: key for name, key in llama.keys().items() if name not in _APART} | _PACKED,
    aliases={},
    repositories=("baichuan-inc/Baichuan-7B",),
    gguf={},
)
