"""Phi 1, 1.5 and 2: one norm for attention and MLP side by side, partly rotated heads."""

from typing import Any

from fastlens.weights.family import Family, Key
from fastlens.weights.rope import ROTARY_ATTRIBUTES, rotary_fields
from fastlens.weights.views import bias_heads, both, input_heads, output_heads, transposed


def _heads_and_rotary(config: dict[str, Any]) -> dict[str, Any]:
    heads = config.get("num_attention_heads", 32)
    kv_heads = config.get("num_key_value_heads") or heads
    d_head = config.get("hidden_size", 2048) // heads
    rotary = rotary_fields(
        config,
        d_head,
        config.get("max_position_embeddings", 2048),
        fraction=config.get("partial_rotary_factor", 0.5),
    )
    return {
        "d_head": d_head,
        "n_key_value_heads": None if kv_heads == heads else kv_heads,
        **rotary,
    }


L, T = "layers.{l}.", "blocks.{l}."
A = L + "self_attn."
_QKV = {"q": ("heads", "W_Q"), "k": ("kv_heads", "{kv}W_K"), "v": ("kv_heads", "{kv}W_V")}
KEYS = {
    "embed_tokens.weight": Key("d_vocab d_model", "embed.W_E"),
    L + "input_layernorm.weight": Key("d_model", (T + "ln1.w", T + "ln2.w"), both),
    L + "input_layernorm.bias": Key("d_model", (T + "ln1.b", T + "ln2.b"), both),
    **{f"{A}{x}_proj.weight": Key(f"{rows} d_model", f"{T}attn.{name}", input_heads)
       for x, (rows, name) in _QKV.items()},
    **{f"{A}{x}_proj.bias": Key(rows, f"{T}attn.{name}".replace("W_", "b_"), bias_heads)
       for x, (rows, name) in _QKV.items()},
    A + "dense.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    A + "dense.bias": Key("d_model", T + "attn.b_O"),
    A + "rotary_emb.inv_freq": None,
    L + "mlp.fc1.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    L + "mlp.fc1.bias": Key("d_mlp", T + "mlp.b_in"),
    L + "mlp.fc2.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    L + "mlp.fc2.bias": Key("d_model", T + "mlp.b_out"),
    "final_layernorm.weight": Key("d_model", "ln_final.w"),
    "final_layernorm.bias": Key("d_model", "ln_final.b"),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    "lm_head.bias": Key("d_vocab", "unembed.b_U"),
}  # fmt: skip

FAMILY = Family(
    name="phi",
    architectures=("PhiForCausalLM",),
    config_class="PhiConfig",
    prefix="model.",
    config={
        "vocab_size": ("d_vocab", 51200),
        "hidden_size": ("d_model", 2048),
        "intermediate_size": ("d_mlp", 8192),
        "num_hidden_layers": ("n_layers", 24),
        "num_attention_heads": ("n_heads", 32),
        "hidden_act": ("act_fn", "gelu_new"),
        "max_position_embeddings": ("n_ctx", 2048),
        "layer_norm_eps": ("eps", 1e-5),
    },
    fixed={"normalization_type": "LN", "parallel_attn_mlp": True},
    derive=_heads_and_rotary,
    reads=ROTARY_ATTRIBUTES | {"num_key_value_heads", "partial_rotary_factor"},
    # No release normalises queries and keys.
    only={"qk_layernorm": False},
    # No dropout in eval mode. Biases are always there, and partial_rotary_factor is what is read.
    ignored=frozenset(
        {"resid_pdrop", "embd_pdrop", "attention_dropout", "attention_bias", "rotary_dim"}
    ),
    keys=KEYS,
    aliases={name: f"microsoft/{name}" for name in ("phi-1", "phi-1_5", "phi-2")},
    default_prepend_bos=False,
)
