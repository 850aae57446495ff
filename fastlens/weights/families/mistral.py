"""Mistral 7B, Nemo and Small: Llama's tensors, with a sliding window in some releases."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama
from fastlens.weights.windows import all_windowed, window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    """Llama's fields, plus local attention in every layer where the config has a window."""
    fields = llama.heads_and_rotary({**DEFAULTS, **config})
    window = config.get("sliding_window", 4096)
    kinds = all_windowed(window, config.get("num_hidden_layers", 32))
    return {**fields, **window_fields(window, kinds, fields)}


# Where Mistral's config differs from Llama's when it says nothing.
DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
_NAMES = {
    "mistral-7b": "Mistral-7B-v0.1",
    "mistral-7b-instruct": "Mistral-7B-Instruct-v0.1",
    "mistral-nemo-base-2407": "Mistral-Nemo-Base-2407",
}

FAMILY = replace(
    llama.FAMILY,
    name="mistral",
    architectures=("MistralForCausalLM",),
    config_class="MistralConfig",
    config={
        **llama.CONFIG,
        "intermediate_size": ("d_mlp", 14336),
        "max_position_embeddings": ("n_ctx", 131072),
    },
    derive=_derive,
    reads=llama.FAMILY.reads | {"sliding_window"},
    only={},
    switches={},
    ignored=frozenset({"attention_dropout"}),
    keys=llama.keys(),
    aliases={alias: f"mistralai/{name}" for alias, name in _NAMES.items()},
    repositories=("mistralai/Mistral-Small-24B-Base-2501",),
    gguf={},
)
