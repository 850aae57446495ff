"""Falcon 7B, 40B, 180B and Falcon 2: rotary positions, parallel blocks, few key-value heads."""

from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.families.bloom import fused_qkv
from fastlens.weights.family import Family, Key
from fastlens.weights.rope import ROTARY_ATTRIBUTES, rotary_fields
from fastlens.weights.views import both, output_heads, transposed


def _has_two_norms(config: dict[str, Any]) -> bool:
    """Whether attention and MLP have a norm each; else one feeds both."""
    norms = config.get("num_ln_in_parallel_attn")
    return bool(config.get("new_decoder_architecture")) and norms in (None, 2)


def _has_one_norm(config: dict[str, Any]) -> bool:
    return not _has_two_norms(config)


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("alibi", False):
        raise ConfigError(
            "this Falcon has alibi=True (Falcon-RW). Its ALiBi bias is rounded to bfloat16 at each "
            "absolute position, which is not computed here, so it is not loaded."
        )
    if not config.get("parallel_attn", True):
        raise ConfigError(
            "this Falcon has parallel_attn=False without ALiBi, which no release has and fastlens "
            "does not compute, so it is not loaded."
        )
    heads = config.get("num_attention_heads") or config.get("n_head") or 71
    d_model = config.get("n_embed") or config.get("hidden_size", 4544)
    kv_heads = heads
    if config.get("new_decoder_architecture"):
        kv_heads = config.get("num_kv_heads") or heads
    elif config.get("multi_query", True):
        kv_heads = 1
    return {
        "d_model": d_model,
        "n_heads": heads,
        "d_head": d_model // heads,
        "d_mlp": config.get("ffn_hidden_size"),
        "n_layers": config.get("num_hidden_layers") or config.get("n_layer") or 32,
        "n_key_value_heads": None if kv_heads == heads else kv_heads,
        **rotary_fields(config, d_model // heads, config.get("max_position_embeddings", 2048)),
    }


SWITCH = "bias"
H, T = "h.{l}.", "blocks.{l}."
A, M = H + "self_attention.", H + "mlp."
_QKV = ("attn.{}_Q", "attn.{{kv}}{}_K", "attn.{{kv}}{}_V")
_FUSED, _GROUPED_ROWS = A + "query_key_value.", "heads+kv_heads+kv_heads"
KEYS = {
    "word_embeddings.weight": Key("d_vocab d_model", "embed.W_E"),
    **{f"{H}{theirs}.{kind}": Key("d_model", f"{T}{ours}.{kind[0]}", when=_has_two_norms)
       for theirs, ours in (("ln_attn", "ln1"), ("ln_mlp", "ln2")) for kind in ("weight", "bias")},
    **{f"{H}input_layernorm.{kind}":
       Key("d_model", (f"{T}ln1.{kind[0]}", f"{T}ln2.{kind[0]}"), both, _has_one_norm)
       for kind in ("weight", "bias")},
    _FUSED + "weight": Key(
        f"{_GROUPED_ROWS} d_model", tuple(T + name.format("W") for name in _QKV), fused_qkv
    ),
    _FUSED + "bias": Key(
        _GROUPED_ROWS, tuple(T + name.format("b") for name in _QKV), fused_qkv, SWITCH
    ),
    A + "dense.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    A + "dense.bias": Key("d_model", T + "attn.b_O", when=SWITCH),
    **dict.fromkeys((A + "maybe_rotary.inv_freq", A + "rotary_emb.inv_freq")),
    M + "dense_h_to_4h.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    M + "dense_h_to_4h.bias": Key("d_mlp", T + "mlp.b_in", when=SWITCH),
    M + "dense_4h_to_h.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    M + "dense_4h_to_h.bias": Key("d_model", T + "mlp.b_out", when=SWITCH),
    **{f"ln_f.{kind}": Key("d_model", f"ln_final.{kind[0]}") for kind in ("weight", "bias")},
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}  # fmt: skip

_SIZES = """falcon-7b falcon-7b-instruct falcon-40b falcon-40b-instruct falcon-180B
falcon-180B-chat falcon-11B""".split()

FAMILY = Family(
    name="falcon",
    # The second is the 7B's name from before transformers had the architecture.
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    config_class="FalconConfig",
    prefix="transformer.",
    config={
        "vocab_size": ("d_vocab", 65024),
        "activation": ("act_fn", "gelu"),
        "max_position_embeddings": ("n_ctx", 2048),
        "layer_norm_epsilon": ("eps", 1e-5),
    },
    fixed={"normalization_type": "LN", "parallel_attn_mlp": True},
    derive=_fields,
    ties_by_default=True,
    reads=ROTARY_ATTRIBUTES
    | set(
        """hidden_size n_embed num_attention_heads n_head num_hidden_layers n_layer num_kv_heads
        multi_query new_decoder_architecture parallel_attn alibi num_ln_in_parallel_attn
        ffn_hidden_size""".split()
    ),
    switches={SWITCH: False},
    # Not read by transformers; one value in all releases.
    only={"apply_residual_connection_post_layernorm": False, "ff_factor": 4},
    ignored=frozenset({"hidden_dropout", "attention_dropout"}),
    keys=KEYS,
    repositories=tuple(f"tiiuae/{size}" for size in _SIZES),
    default_prepend_bos=False,
)
