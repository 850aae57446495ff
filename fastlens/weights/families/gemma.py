"""Gemma 1 and 1.1, CodeGemma: Llama with gains counted from one, and scaled embeddings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama
from fastlens.weights.family import Key
from fastlens.weights.views import plus_one


def grouped_heads(config: dict[str, Any]) -> dict[str, Any]:
    """Llama's fields, with keys and values always grouped, as TransformerLens has Gemma's."""
    fields = llama.heads_and_rotary(config)
    return {**fields, "n_key_value_heads": config["num_key_value_heads"]}


def gains_from_one(keys: Mapping[str, Key | None]) -> dict[str, Key | None]:
    """The same tensors where gains of norms are stored as their difference from one."""
    return {
        name: replace(key, view=plus_one) if key and name.endswith("norm.weight") else key
        for name, key in keys.items()
    }


def embedding_scale(config: dict[str, Any], hidden_size: int = 3072) -> float:
    """The root of ``d_model``, which scales W_E but not the W_U that is tied to it."""
    return config.get("hidden_size", hidden_size) ** 0.5


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    activation = config["hidden_act"]
    # The first configs say "gelu"; the models were trained with its tanh approximation, and
    # transformers computes that. (TransformerLens computes the exact one.)
    act_fn = "gelu_pytorch_tanh" if activation == "gelu" else activation
    return {**grouped_heads(config), "act_fn": act_fn}


_DEFAULTS = {"hidden_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 16,
             "head_dim": 256, "max_position_embeddings": 8192,
             "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip
_NAMES = ("gemma-2b", "gemma-7b", "gemma-2b-it", "gemma-7b-it")

FAMILY = replace(
    llama.FAMILY,
    name="gemma",
    architectures=("GemmaForCausalLM",),
    config_class="GemmaConfig",
    config={
        "vocab_size": ("d_vocab", 256000),
        "hidden_size": ("d_model", 3072),
        "intermediate_size": ("d_mlp", 24576),
        "num_hidden_layers": ("n_layers", 28),
        "num_attention_heads": ("n_heads", 16),
        "hidden_act": ("act_fn", "gelu_pytorch_tanh"),
        "max_position_embeddings": ("n_ctx", 8192),
        "rms_norm_eps": ("eps", 1e-6),
    },
    derive=_derive,
    ties_by_default=True,
    factors={"embed.W_E": embedding_scale},
    # The second name of the activation, which not all of transformers' versions read.
    only={"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
    switches={llama.SWITCH: False},
    ignored=frozenset({"attention_dropout"}),
    keys=gains_from_one(llama.keys(llama.SWITCH, llama.SWITCH)),
    aliases={name: f"google/{name}" for name in _NAMES},
    repositories=("google/gemma-1.1-2b-it", "google/gemma-1.1-7b-it", "google/codegemma-2b"),
    gguf={},
)
