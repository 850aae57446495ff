"""OLMo 3 and 3.1: OLMo 2 with windows in three of four layers, and YaRN in the others."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama, olmo2
from fastlens.weights.rope import rotary_fields_of_kinds
from fastlens.weights.windows import window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    layers, heads = config.get("num_hidden_layers", 32), config.get("num_attention_heads", 32)
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer % 4 else "full_attention" for layer in range(1, layers + 1)
    ]
    d_head = config.get("head_dim") or config.get("hidden_size", 4096) // heads
    n_ctx = config.get("max_position_embeddings", 2048)
    return {
        "d_head": d_head,
        # Always grouped, as TransformerLens has OLMo 3's.
        "n_key_value_heads": config.get("num_key_value_heads") or heads,
        **rotary_fields_of_kinds(config, d_head, n_ctx, kinds, theta=500000.0),
        # Windowed layers are not scaled in OLMo 3 either.
        **window_fields(config.get("sliding_window", 4096), kinds, {}),
    }


_RUNS = """3-1025-7B 3-7B-Instruct 3-7B-Think 3-1125-32B 3-32B-Think 3.1-32B-Instruct
3.1-32B-Think""".split()

FAMILY = replace(
    olmo2.FAMILY,
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    config_class="Olmo3Config",
    derive=_derive,
    reads=llama.FAMILY.reads | {"sliding_window", "layer_types"},
    aliases={f"olmo-{run}".lower(): f"allenai/Olmo-{run}" for run in _RUNS},
    repositories=(),
)
