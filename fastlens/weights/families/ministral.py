"""Ministral: Mistral with a window in some of its layers."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama, mistral
from fastlens.weights.windows import all_windowed, window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    fields = llama.heads_and_rotary({**mistral.DEFAULTS, **config})
    window = config.get("sliding_window", 4096)
    stated = config.get("layer_types")
    kinds = stated or all_windowed(window, config.get("num_hidden_layers", 32))
    return {**fields, **window_fields(window, kinds, fields)}


FAMILY = replace(
    mistral.FAMILY,
    name="ministral",
    architectures=("MinistralForCausalLM",),
    config_class="MinistralConfig",
    derive=_derive,
    reads=mistral.FAMILY.reads | {"layer_types"},
    aliases={},
    repositories=("mistralai/Ministral-8B-Instruct-2410",),
)
