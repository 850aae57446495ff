"""BLOOM and BLOOMZ: ALiBi positions, a LayerNorm behind the embedding, fused q, k and v."""

from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.weights.family import Family, Key
from fastlens.weights.views import output_heads, transposed


def fused_qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, Tensor, Tensor]:
    """``[(group, its query heads + key + value, d_head), d_model]``, or a bias without the last.

    Without grouped heads a group is one head.
    """
    groups = cfg.n_key_value_heads or cfg.n_heads
    queries = cfg.n_heads // groups
    parts = tensor.view(groups, queries + 2, cfg.d_head, *tensor.shape[1:])
    q, k, v = (part.flatten(0, 1) for part in parts.split([queries, 1, 1], 1))
    if tensor.ndim == 1:
        return q, k, v
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes, by today's names or those of the first release, which transformers also reads."""
    d_model = config.get("n_embed") or config.get("hidden_size", 64)
    heads = config.get("n_head") or config.get("num_attention_heads", 8)
    layers = config.get("n_layer") or config.get("num_hidden_layers", 2)
    return {
        "d_model": d_model,
        "n_heads": heads,
        "d_head": d_model // heads,
        "n_layers": layers,
        # ALiBi reaches any length; this is what it was trained with.
        "n_ctx": config.get("seq_length") or 2048,
    }


A, T = "h.{l}.self_attention.", "blocks.{l}."
M = "h.{l}.mlp."
_NORMS = {
    "word_embeddings_layernorm": "embed.ln",
    "h.{l}.input_layernorm": T + "ln1",
    "h.{l}.post_attention_layernorm": T + "ln2",
    "ln_f": "ln_final",
}
KEYS = {
    "word_embeddings.weight": Key("d_vocab d_model", "embed.W_E"),
    **{f"{theirs}.weight": Key("d_model", f"{ours}.w") for theirs, ours in _NORMS.items()},
    **{f"{theirs}.bias": Key("d_model", f"{ours}.b") for theirs, ours in _NORMS.items()},
    A + "query_key_value.weight": Key(
        "qkv d_model", tuple(f"{T}attn.W_{x}" for x in "QKV"), fused_qkv
    ),
    A + "query_key_value.bias": Key("qkv", tuple(f"{T}attn.b_{x}" for x in "QKV"), fused_qkv),
    A + "dense.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    A + "dense.bias": Key("d_model", T + "attn.b_O"),
    M + "dense_h_to_4h.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    M + "dense_h_to_4h.bias": Key("d_mlp", T + "mlp.b_in"),
    M + "dense_4h_to_h.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    M + "dense_4h_to_h.bias": Key("d_model", T + "mlp.b_out"),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}

_SIZES = ("560m", "1b1", "1b7", "3b", "7b1")

FAMILY = Family(
    name="bloom",
    architectures=("BloomForCausalLM",),
    config_class="BloomConfig",
    prefix="transformer.",
    config={"vocab_size": ("d_vocab", 250880), "layer_norm_epsilon": ("eps", 1e-5)},
    fixed={
        "normalization_type": "LN",
        "positional_embedding_type": "alibi",
        "post_embedding_ln": True,
        "act_fn": "gelu_fast",
    },
    derive=_sizes,
    ties_by_default=True,
    reads=frozenset(
        """hidden_size n_embed n_head num_attention_heads n_layer num_hidden_layers
        seq_length""".split()
    ),
    # transformers drops biases where it sums over slices, and norms what goes around a sublayer.
    only={"slow_but_exact": False, "apply_residual_connection_post_layernorm": False},
    # No dropout in eval mode; the others are how the first code computed the same thing.
    ignored=frozenset(
        """hidden_dropout attention_dropout pretraining_tp attention_softmax_in_fp32
        bias_dropout_fusion masked_softmax_fusion offset_alibi skip_bias_add
        skip_bias_add_qkv""".split()
    ),
    keys=KEYS,
    aliases={f"bloom-{size}": f"bigscience/bloom-{size}" for size in _SIZES},
    repositories=(
        "bigscience/bloom",
        "bigscience/bloomz",
        *(f"bigscience/bloomz-{size}" for size in _SIZES),
    ),
    default_prepend_bos=False,
)
