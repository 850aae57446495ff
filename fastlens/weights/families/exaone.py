"""EXAONE 3 and 3.5: Llama under GPT-2's names (remote code)."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama
from fastlens.weights.family import Key
from fastlens.weights.views import input_heads, output_heads, transposed

# Its names of Llama's attributes.
_AS_LLAMA = {"num_layers": "num_hidden_layers", "activation_function": "hidden_act",
             "layer_norm_epsilon": "rms_norm_eps"}  # fmt: skip


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    return llama.heads_and_rotary(config)


A, M, T = "h.{l}.attn.attention.", "h.{l}.mlp.", "blocks.{l}."
_QKV = {"q": ("heads", "W_Q"), "k": ("kv_heads", "{kv}W_K"), "v": ("kv_heads", "{kv}W_V")}
KEYS: dict[str, Key | None] = {
    "wte.weight": Key("d_vocab d_model", "embed.W_E"),
    "h.{l}.ln_1.weight": Key("d_model", T + "ln1.w"),
    **{f"{A}{x}_proj.weight": Key(f"{rows} d_model", f"{T}attn.{name}", input_heads)
       for x, (rows, name) in _QKV.items()},
    A + "out_proj.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    A + "rotary.inv_freq": None,
    "rotary.inv_freq": None,
    "h.{l}.ln_2.weight": Key("d_model", T + "ln2.w"),
    M + "c_fc_0.weight": Key("d_mlp d_model", T + "mlp.W_gate", transposed),
    M + "c_fc_1.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    M + "c_proj.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    "ln_f.weight": Key("d_model", "ln_final.w"),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}  # fmt: skip

FAMILY = replace(
    llama.FAMILY,
    name="exaone",
    architectures=("ExaoneForCausalLM",),
    config_class="PretrainedConfig",
    prefix="transformer.",
    config={
        **{theirs: llama.CONFIG[ours] for theirs, ours in _AS_LLAMA.items()},
        "vocab_size": ("d_vocab", 102400),
        "hidden_size": ("d_model", 2048),
        "intermediate_size": ("d_mlp", 8192),
        "num_attention_heads": ("n_heads", 32),
        "max_position_embeddings": ("n_ctx", 2048),
        "layer_norm_epsilon": ("eps", 1e-6),
    },
    derive=_derive,
    ties_by_default=True,
    only={},
    switches={},
    # No dropout in eval mode.
    ignored=frozenset({"attention_dropout", "embed_dropout"}),
    keys=KEYS,
    aliases={},
    repositories=("LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct",
                  *(f"LGAI-EXAONE/EXAONE-3.5-{size}B-Instruct" for size in ("2.4", "7.8", "32"))),
    gguf={},
)  # fmt: skip
