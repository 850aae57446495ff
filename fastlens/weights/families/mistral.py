"""Mistral 7B, Nemo and Small: Llama's tensors, with a sliding window in some releases."""

from dataclasses import replace
from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.families import llama


def _window(config: dict[str, Any]) -> dict[str, Any]:
    """Llama's fields, plus local attention in every layer where the config has a window."""
    fields = llama.heads_and_rotary({**_DEFAULTS, **config})
    window = config.get("sliding_window", 4096)
    if window is None:
        return fields
    if fields.get("rotary_scaling_factor", 1.0) != 1.0:
        raise ConfigError(
            f"sliding_window={window} and linear rotary scaling were asked together. Layers with a "
            f"window are not scaled here, so this model cannot be computed exactly."
        )
    layers = config.get("num_hidden_layers", 32)
    return {
        **fields,
        "use_local_attn": True,
        "window_size": window,
        "attn_types": ["local"] * layers,
    }


# Where Mistral's config differs from Llama's when it says nothing.
_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
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
    derive=_window,
    reads=llama.FAMILY.reads | {"sliding_window"},
    switches={},
    ignored=frozenset({"attention_dropout"}),
    keys={pattern: key for pattern, key in llama.KEYS.items() if key is None or not key.when},
    aliases={alias: f"mistralai/{name}" for alias, name in _NAMES.items()},
    repositories=("mistralai/Mistral-Small-24B-Base-2501",),
    gguf={},
)
