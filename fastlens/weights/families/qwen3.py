"""Qwen 3: Llama with an RMS norm of every head's queries and keys."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama, qwen2
from fastlens.weights.family import Key


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    fields = llama.heads_and_rotary(config)
    return {**fields, **qwen2.late_windows(config, fields)}


_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128}
# One gain for all heads.
QK_NORMS = {
    f"layers.{{l}}.self_attn.{x}_norm.weight": Key("d_head", f"blocks.{{l}}.attn.{x}_norm.w")
    for x in "qk"
}
_RUNS = "0.6B 1.7B 4B 8B 14B 0.6B-Base".split()

FAMILY = replace(
    qwen2.FAMILY,
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    config_class="Qwen3Config",
    fixed={**llama.FAMILY.fixed, "use_qk_norm": True},
    derive=_derive,
    switches={llama.SWITCH: False},
    keys={**llama.keys(llama.SWITCH, llama.SWITCH), **QK_NORMS},
    aliases={f"qwen3-{run}".lower(): f"Qwen/Qwen3-{run}" for run in _RUNS},
    repositories=("Qwen/Qwen3-32B", "Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-4B-Instruct-2507"),
)
