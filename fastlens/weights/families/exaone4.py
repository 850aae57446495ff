"""EXAONE 4: OLMo 2's norms behind the sublayers, QK-norms, global layers without positions."""

from dataclasses import replace
from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.families import llama, olmo2
from fastlens.weights.families.qwen3 import QK_NORMS
from fastlens.weights.windows import window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    fields = llama.heads_and_rotary({"num_key_value_heads": 32, **config})
    window = config.get("sliding_window", 4096)
    if window is None:
        return fields
    kinds = _kinds(config)
    return {
        **fields,
        # In a model with windows, only windowed layers rotate queries and keys.
        "rotary_layers": [kind == "sliding_attention" for kind in kinds],
        **window_fields(window, kinds, fields),
    }


def _kinds(config: dict[str, Any]) -> list[str]:
    """Which layers have a window."""
    if config.get("layer_types"):
        return config["layer_types"]
    pattern = config.get("sliding_window_pattern", 4)
    if not isinstance(pattern, int) or pattern < 1:
        raise ConfigError(
            f"sliding_window_pattern={pattern!r} was asked without layer_types, and transformers "
            f"reads only numbers there. Set layer_types, one for each layer."
        )
    layers = range(1, config.get("num_hidden_layers", 32) + 1)
    return ["sliding_attention" if layer % pattern else "full_attention" for layer in layers]


_INPUT_NORM = "layers.{l}.input_layernorm.weight"
_ALL = {**llama.keys(), **olmo2.NORMS, **QK_NORMS}

FAMILY = replace(
    llama.FAMILY,
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    config_class="Exaone4Config",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 102400),
        "intermediate_size": ("d_mlp", 16384),
        "rms_norm_eps": ("eps", 1e-5),
    },
    fixed={**llama.FAMILY.fixed, "norm_after_sublayer": True, "use_qk_norm": True},
    derive=_derive,
    reads=llama.FAMILY.reads | {"sliding_window", "sliding_window_pattern", "layer_types"},
    only={},
    switches={},
    # The kind of KV cache.
    ignored=llama.FAMILY.ignored | {"cache_implementation"},
    keys={name: key for name, key in _ALL.items() if name != _INPUT_NORM},
    aliases={},
    repositories=("LGAI-EXAONE/EXAONE-4.0-32B", "LGAI-EXAONE/EXAONE-4.0-1.2B"),
    default_prepend_bos=False,
    gguf={},
)
