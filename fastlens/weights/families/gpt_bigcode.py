"""StarCoder 1 and SantaCoder as transformers has it: GPT-2 with one key-value head."""

from typing import Any

from fastlens.weights.families.bloom import fused_qkv
from fastlens.weights.family import Family, Key
from fastlens.weights.views import first_positions, output_heads, transposed


def _heads(config: dict[str, Any]) -> dict[str, Any]:
    heads = config.get("n_head", 12)
    kv_heads = 1 if config.get("multi_query", True) else heads
    return {
        "d_head": config.get("n_embd", 768) // heads,
        "n_key_value_heads": None if kv_heads == heads else kv_heads,
    }


H, T = "h.{l}.", "blocks.{l}."
_ROWS = "heads+kv_heads+kv_heads"
_QKV = ("attn.{}_Q", "attn.{{kv}}{}_K", "attn.{{kv}}{}_V")
_NORMS = {H + "ln_1": T + "ln1", H + "ln_2": T + "ln2", "ln_f": "ln_final"}
KEYS = {
    "wte.weight": Key("d_vocab d_model", "embed.W_E"),
    "wpe.weight": Key("n_ctx d_model", "pos_embed.W_pos", first_positions),
    **{f"{theirs}.{kind}": Key("d_model", f"{ours}.{kind[0]}")
       for theirs, ours in _NORMS.items() for kind in ("weight", "bias")},
    # Queries, key and value of a group lie together: one group of all heads, or one a head.
    H + "attn.c_attn.weight": Key(
        f"{_ROWS} d_model", tuple(T + name.format("W") for name in _QKV), fused_qkv
    ),
    H + "attn.c_attn.bias": Key(_ROWS, tuple(T + name.format("b") for name in _QKV), fused_qkv),
    H + "attn.c_proj.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    H + "attn.c_proj.bias": Key("d_model", T + "attn.b_O"),
    **dict.fromkeys(("bias", H + "attn.bias", H + "attn.masked_bias")),
    H + "mlp.c_fc.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    H + "mlp.c_fc.bias": Key("d_mlp", T + "mlp.b_in"),
    H + "mlp.c_proj.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    H + "mlp.c_proj.bias": Key("d_model", T + "mlp.b_out"),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}  # fmt: skip

FAMILY = Family(
    name="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM",),
    config_class="GPTBigCodeConfig",
    prefix="transformer.",
    config={
        "vocab_size": ("d_vocab", 50257),
        "n_positions": ("n_ctx", 1024),
        "n_embd": ("d_model", 768),
        "n_layer": ("n_layers", 12),
        "n_head": ("n_heads", 12),
        "n_inner": ("d_mlp", None),
        "activation_function": ("act_fn", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": ("eps", 1e-5),
        "scale_attn_weights": ("use_attn_scale", True),
    },
    fixed={"normalization_type": "LN"},
    derive=_heads,
    ties_by_default=True,
    reads=frozenset({"multi_query"}),
    only={"add_cross_attention": False},
    # No dropout in eval mode; where scores are rounded, how the first code ran, heads of tasks.
    # num_key_value_heads is written by transformers, which reads multi_query.
    ignored=frozenset(
        """resid_pdrop embd_pdrop attn_pdrop attention_softmax_in_fp32 num_key_value_heads
        scale_attention_softmax_in_fp32 inference_runner validate_runner_input max_sequence_length
        max_batch_size pad_key_length pre_allocate_kv_cache summary_type summary_use_proj
        summary_activation summary_proj_to_labels summary_first_dropout""".split()
    ),
    keys=KEYS,
    repositories=(
        "bigcode/gpt_bigcode-santacoder",
        "bigcode/tiny_starcoder_py",
        "bigcode/starcoder",
        "bigcode/starcoderplus",
        "bigcode/octocoder",
        *(f"bigcode/starcoderbase{size}" for size in ("", "-1b", "-3b", "-7b")),
    ),
)
