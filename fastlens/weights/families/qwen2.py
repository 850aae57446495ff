"""Qwen 1.5, 2 and 2.5, QwQ: Llama with biases on queries, keys and values."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama
from fastlens.weights.windows import window_fields

# What `late_windows` reads.
WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def late_windows(config: dict[str, Any], rotary: dict[str, Any]) -> dict[str, Any]:
    """Windows from layer ``max_window_layers`` on, where ``use_sliding_window`` asks for them."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28) if window is not None else None
    kinds = config.get("layer_types") or [
        "full_attention" if first is None or layer < first else "sliding_attention"
        for layer in range(config.get("num_hidden_layers", 32))
    ]
    return window_fields(window, kinds, rotary)


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 32, "max_position_embeddings": 32768, **config}
    fields = llama.heads_and_rotary(config)
    # TransformerLens always gives Qwen-2 grouped heads, if only groups of one.
    kv_heads = fields["n_key_value_heads"] or config.get("num_attention_heads", 32)
    return {**fields, "n_key_value_heads": kv_heads, **late_windows(config, fields)}


CONFIG = {
    **llama.CONFIG,
    "vocab_size": ("d_vocab", 151936),
    "intermediate_size": ("d_mlp", 22016),
    "max_position_embeddings": ("n_ctx", 32768),
}
_SIZES = {"1.5": "0.5B 1.8B 4B 7B 14B", "2": "0.5B 1.5B 7B",
          "2.5": "0.5B 1.5B 3B 7B 14B 32B 72B"}  # fmt: skip
_RUNS = [
    f"Qwen{version}-{size}{'' if base else '-Chat' if version == '1.5' else '-Instruct'}"
    for version, sizes in _SIZES.items()
    for size in sizes.split()
    for base in (True, False)
]

FAMILY = replace(
    llama.FAMILY,
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    config_class="Qwen2Config",
    config=CONFIG,
    derive=_derive,
    reads=llama.FAMILY.reads | WINDOWS,
    # Rotary positions of pictures; on in no text model.
    only={"use_mrope": False},
    switches={},
    ignored=frozenset({"attention_dropout"}),
    keys=llama.keys(qkv_bias=True),
    aliases={
        **{run.lower(): f"Qwen/{run}" for run in _RUNS},
        "qwen-32b-preview": "Qwen/QwQ-32B-Preview",
    },
    repositories=("Qwen/QwQ-32B", "Qwen/Qwen2.5-Coder-7B", "Qwen/Qwen2.5-Math-7B"),
    default_prepend_bos=False,
    gguf={},
)
