"""Baichuan 1 and 2, 7B and 13B: Llama whose q, k and v are one matrix (remote code)."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.weights.families import llama
from fastlens.weights.family import Key
from fastlens.weights.rope import ROTARY_ATTRIBUTES
from fastlens.weights.views import input_heads

# The second release's, whose code scales every token's unembedding to length one.
SECOND_VOCABULARY = 125696


def _qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """``[(qkv head d_head), d_model]``."""
    return tuple(input_heads(part, cfg) for part in tensor.chunk(3))


def _unembedding(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    return (F.normalize(tensor) if cfg.d_vocab == SECOND_VOCABULARY else tensor).t()


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    if "max_position_embeddings" in config:
        return llama.heads_and_rotary(config)
    # Only the 13B models' code knows no such attribute: they have ALiBi.
    heads = config.get("num_attention_heads", 40)
    return {
        "n_ctx": config.get("model_max_length", 4096),
        "d_head": config.get("hidden_size", 5120) // heads,
        "positional_embedding_type": "alibi",
    }


_APART = {llama.A + f"{x}_proj.weight" for x in "qkv"}
_INTO = tuple(f"blocks.{{l}}.attn.W_{x}" for x in "QKV")
_OWN: dict[str, Key | None] = {
    llama.A + "W_pack.weight": Key("qkv d_model", _INTO, _qkv),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", _unembedding),
}

FAMILY = replace(
    llama.FAMILY,
    name="baichuan",
    architectures=("BaiChuanForCausalLM", "BaichuanForCausalLM"),
    config_class="PretrainedConfig",
    config={**llama.CONFIG, "vocab_size": ("d_vocab", 64000)},
    derive=_derive,
    reads=ROTARY_ATTRIBUTES | {"model_max_length"},
    only={},
    switches={},
    # Of training's loss, and of the chat's turns.
    ignored=frozenset({"z_loss_weight", "user_token_id", "assistant_token_id"}),
    keys={name: key for name, key in llama.keys().items() if name not in _APART} | _OWN,
    aliases={},
    repositories=(
        *(f"baichuan-inc/Baichuan-{kind}" for kind in ("7B", "13B-Base", "13B-Chat")),
        *(f"baichuan-inc/Baichuan2-{s}B-{kind}" for s in (7, 13) for kind in ("Base", "Chat")),
    ),
    gguf={},
)
