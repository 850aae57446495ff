"""Persimmon: squared ReLU, half of each head rotated, a LayerNorm of queries and keys."""

from typing import Any

from fastlens.weights.families import gpt_neox
from fastlens.weights.families.bloom import fused_qkv
from fastlens.weights.family import Family, Key
from fastlens.weights.rope import ROTARY_ATTRIBUTES, rotary_fields
from fastlens.weights.views import output_heads


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    d_head = config.get("hidden_size", 4096) // config.get("num_attention_heads", 64)
    n_ctx, fraction = config.get("max_position_embeddings", 16384), 0.5
    fraction = config.get("partial_rotary_factor", fraction)
    return {"d_head": d_head, **rotary_fields(config, d_head, n_ctx, fraction=fraction)}


SWITCH = "qk_layernorm"
L, T = "layers.{l}.", "blocks.{l}."
A, _NEOX = L + "self_attn.", gpt_neox.KEYS
KEYS = {
    "embed_tokens.weight": Key("d_vocab d_model", "embed.W_E"),
    **{name: key for name, key in _NEOX.items()
       if name.startswith(L) and ".attention." not in name},
    A + "query_key_value.weight": Key(
        "qkv d_model", tuple(f"{T}attn.W_{x}" for x in "QKV"), fused_qkv
    ),
    A + "query_key_value.bias": Key("qkv", tuple(f"{T}attn.b_{x}" for x in "QKV"), fused_qkv),
    **{
        f"{A}{x}_layernorm.{kind}": Key("d_head", f"{T}attn.{x}_norm.{kind[0]}", when=SWITCH)
        for x in "qk"
        for kind in ("weight", "bias")
    },
    A + "dense.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    A + "dense.bias": Key("d_model", T + "attn.b_O"),
    A + "rotary_emb.inv_freq": None,
    **{f"final_layernorm.{kind}": Key("d_model", f"ln_final.{kind[0]}")
       for kind in ("weight", "bias")},
    "lm_head.weight": _NEOX["lm_head.weight"],
}  # fmt: skip

FAMILY = Family(
    name="persimmon",
    architectures=("PersimmonForCausalLM",),
    config_class="PersimmonConfig",
    prefix="model.",
    config={
        "vocab_size": ("d_vocab", 262144),
        "hidden_size": ("d_model", 4096),
        "intermediate_size": ("d_mlp", 16384),
        "num_hidden_layers": ("n_layers", 36),
        "num_attention_heads": ("n_heads", 64),
        "hidden_act": ("act_fn", "relu2"),
        "max_position_embeddings": ("n_ctx", 16384),
        "layer_norm_eps": ("eps", 1e-5),
        SWITCH: ("use_qk_norm", True),
    },
    fixed={"normalization_type": "LN", "qk_norm_kind": "shared_layer_norm"},
    derive=_fields,
    reads=ROTARY_ATTRIBUTES | {"partial_rotary_factor"},
    switches={SWITCH: True},
    ignored=frozenset({"hidden_dropout", "attention_dropout"}),
    keys=KEYS,
    repositories=("adept/persimmon-8b-base", "adept/persimmon-8b-chat"),
)
