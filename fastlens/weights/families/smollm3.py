"""SmolLM 3: Llama with layers that know no positions."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama
from fastlens.weights.windows import window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    fields = llama.heads_and_rotary(config)
    layers, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    # Despite its name, the list is true where positions are rotated.
    stated = config.get("no_rope_layers") or [(layer + 1) % interval for layer in range(layers)]
    rotated = [bool(value) for value in stated]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or [
        "full_attention" if window is None or with_rope else "sliding_attention"
        for with_rope in rotated[:layers]
    ]
    if not all(rotated[:layers]):
        fields["rotary_layers"] = rotated
    return {**fields, **window_fields(window, kinds, fields)}


_DEFAULTS = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4,
             "num_hidden_layers": 36, "max_position_embeddings": 32768, "rope_theta": 2000000.0,
             "no_rope_layer_interval": 4}  # fmt: skip

FAMILY = replace(
    llama.FAMILY,
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    config_class="SmolLM3Config",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 128256),
        "hidden_size": ("d_model", 2048),
        "num_hidden_layers": ("n_layers", 36),
        "num_attention_heads": ("n_heads", 16),
        "max_position_embeddings": ("n_ctx", 32768),
    },
    derive=_derive,
    ties_by_default=True,
    reads=llama.FAMILY.reads
    | set(
        """no_rope_layers no_rope_layer_interval use_sliding_window sliding_window
        layer_types""".split()
    ),
    only={},
    # Written into configs by transformers; windows of SmolLM-3 follow from the two lists.
    ignored=llama.FAMILY.ignored | {"max_window_layers"},
    aliases={},
    repositories=("HuggingFaceTB/SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B-Base"),
    default_prepend_bos=False,
    gguf={},
)
