"""What families of Llama's shape share: their heads and rotary fields, and their tensors."""

from dataclasses import replace
from typing import Any

from fastlens.weights.family import Key
from fastlens.weights.rope import rotary_fields
from fastlens.weights.views import bias_heads, input_heads, must_be_zero, output_heads, transposed


def heads_and_rotary(config: dict[str, Any], fraction: float | int | None = None) -> dict[str, Any]:
    """Head sizes and rotary fields; ``n_key_value_heads`` is set only where heads are grouped.

    ``fraction`` is the rotated share of a head, for families that rotate less than whole heads.
    """
    heads = config.get("num_attention_heads", 32)
    d_head = config.get("head_dim") or config.get("hidden_size", 4096) // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return {
        "d_head": d_head,
        "n_key_value_heads": None if kv_heads == heads else kv_heads,
        **rotary_fields(
            config, d_head, config.get("max_position_embeddings", 2048), fraction=fraction
        ),
    }


SWITCH = "attention_bias"
A, M, T = "layers.{l}.self_attn.", "layers.{l}.mlp.", "blocks.{l}."
_QKV = {"q": ("heads", "W_Q"), "k": ("kv_heads", "{kv}W_K"), "v": ("kv_heads", "{kv}W_V")}


def keys(
    qkv_bias: str | bool = False,
    o_bias: str | bool = False,
    mlp_bias: str | bool = False,
    *,
    gated: bool = True,
) -> dict[str, Key | None]:
    """Llama's tensors.

    Args:
        qkv_bias, o_bias, mlp_bias: True for biases that are always there, False for none, or the
            config attribute that switches them.
        gated: Whether the MLP has a gate. Biases of a gate must be zero.
    """
    norm, up_bias = Key("d_model", T + "ln1.w"), Key("d_mlp", T + "mlp.b_in")
    found: dict[str, Key | None] = {
        "embed_tokens.weight": Key("d_vocab d_model", "embed.W_E"),
        "layers.{l}.input_layernorm.weight": norm,
        **{f"{A}{x}_proj.weight": Key(f"{rows} d_model", f"{T}attn.{name}", input_heads)
           for x, (rows, name) in _QKV.items()},
        **{f"{A}{x}_proj.bias": Key(rows, f"{T}attn.{name}".replace("W_", "b_"), bias_heads)
           for x, (rows, name) in _QKV.items()},
        A + "o_proj.weight": Key("d_model heads", T + "attn.W_O", output_heads),
        A + "o_proj.bias": Key("d_model", T + "attn.b_O"),
        A + "rotary_emb.inv_freq": None,
        "layers.{l}.post_attention_layernorm.weight": replace(norm, into=T + "ln2.w"),
        M + "gate_proj.weight": Key("d_mlp d_model", T + "mlp.W_gate", transposed),
        M + "up_proj.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
        M + "down_proj.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
        M + "gate_proj.bias": Key("d_mlp", (), must_be_zero),
        M + "up_proj.bias": Key("d_mlp", (), must_be_zero) if gated else up_bias,
        M + "down_proj.bias": Key("d_model", T + "mlp.b_out"),
        "norm.weight": Key("d_model", "ln_final.w"),
        "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    }  # fmt: skip
    if not gated:
        del found[M + "gate_proj.weight"], found[M + "gate_proj.bias"]
    for pattern, key in list(found.items()):
        if key is None or not pattern.endswith(".bias"):
            continue
        here = mlp_bias if pattern.startswith(M) else o_bias if "o_proj" in pattern else qkv_bias
        if here is False:
            del found[pattern]
        elif isinstance(here, str):
            found[pattern] = replace(key, when=here)
    return found
