"""Cohere 2 (Command R7B, Command A): Cohere with windows, and layers that know no positions."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import cohere, llama
from fastlens.weights.windows import window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    fields = cohere.heads_and_rotary(config)
    layers = config.get("num_hidden_layers", 40)
    pattern = config.get("sliding_window_pattern", 4)
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer % pattern else "full_attention"
        for layer in range(1, layers + 1)
    ]
    return {
        **fields,
        # Only windowed layers rotate queries and keys.
        "rotary_layers": [kind == "sliding_attention" for kind in kinds],
        **window_fields(config.get("sliding_window", 4096), kinds, fields),
    }


FAMILY = replace(
    cohere.FAMILY,
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    config_class="Cohere2Config",
    config=cohere.CONFIG,
    fixed={key: value for key, value in cohere.FAMILY.fixed.items() if key != "qk_norm_kind"},
    derive=_derive,
    reads=cohere.FAMILY.reads | {"sliding_window", "sliding_window_pattern", "layer_types"},
    # Left in published configs; one value in all of them.
    only={
        "use_qk_norm": False,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "order_of_interleaved_layers": "local_attn_first",
        "layer_switch": 4,
    },
    switches={llama.SWITCH: False},
    # The kind of KV cache, and how embeddings were spread over devices.
    ignored=cohere.FAMILY.ignored
    | {"cache_implementation", "use_embedding_sharing", "use_parallel_embedding"},
    keys=cohere.KEYS,
    repositories=(
        "CohereForAI/c4ai-command-r7b-12-2024",
        "CohereForAI/c4ai-command-a-03-2025",
    ),
)
