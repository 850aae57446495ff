"""Cohere's Command R and Aya: parallel blocks with one LayerNorm, adjacent rotary pairs."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama
from fastlens.weights.family import Key
from fastlens.weights.views import both


def heads_and_rotary(config: dict[str, Any]) -> dict[str, Any]:
    """Llama's fields, with channels that are next to each other rotated together."""
    fields = llama.heads_and_rotary(
        {"hidden_size": 8192, "num_attention_heads": 64, "max_position_embeddings": 8192, **config}
    )
    return {**fields, "rotary_adjacent_pairs": True}


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    return heads_and_rotary({"rope_theta": 500000.0, **config})


QK_NORM = "use_qk_norm"
_BOTH_NORMS = ("blocks.{l}.ln1.w", "blocks.{l}.ln2.w")
KEYS = llama.keys(llama.SWITCH, llama.SWITCH) | {
    # One norm, which attention and MLP read; TransformerLens' parallel blocks have two.
    "layers.{l}.input_layernorm.weight": Key("d_model", _BOTH_NORMS, both)
}
del KEYS["layers.{l}.post_attention_layernorm.weight"]
# A gain for each channel of each head, but the mean of one head.
_QK_NORMS = {
    f"{llama.A}{x}_norm.weight": Key(
        f"{heads} d_head", f"blocks.{{l}}.attn.{x}_norm.w", when=QK_NORM
    )
    for x, heads in (("q", "n_heads"), ("k", "n_kv_heads"))
}
CONFIG = {
    "vocab_size": ("d_vocab", 256000),
    "hidden_size": ("d_model", 8192),
    "intermediate_size": ("d_mlp", 22528),
    "num_hidden_layers": ("n_layers", 40),
    "num_attention_heads": ("n_heads", 64),
    "hidden_act": ("act_fn", "silu"),
    "max_position_embeddings": ("n_ctx", 8192),
    "layer_norm_eps": ("eps", 1e-5),
}
_RUNS = """c4ai-command-r-v01 c4ai-command-r-plus c4ai-command-r-08-2024 aya-23-8B aya-23-35B
aya-expanse-8b aya-expanse-32b""".split()

FAMILY = replace(
    llama.FAMILY,
    name="cohere",
    architectures=("CohereForCausalLM",),
    config_class="CohereConfig",
    config={**CONFIG, QK_NORM: (QK_NORM, False)},
    fixed={
        "normalization_type": "LN",
        "gated_mlp": True,
        "parallel_attn_mlp": True,
        "qk_norm_kind": "layer_norm",
    },
    derive=_derive,
    ties_by_default=True,
    factors={"unembed.W_U": lambda config: config.get("logit_scale", 0.0625)},
    reads=llama.FAMILY.reads | {"logit_scale"},
    only={},
    switches={llama.SWITCH: False, QK_NORM: False},
    # What the tokenizer was told.
    ignored=llama.FAMILY.ignored | {"model_max_length"},
    keys={**KEYS, **_QK_NORMS},
    aliases={},
    repositories=tuple(f"CohereForAI/{run}" for run in _RUNS),
    gguf={},
)
