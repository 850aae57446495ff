"""DistilBERT: BERT's blocks without token types and pooler. Loaded by `HookedEncoder`."""

from typing import Any

from fastlens.config import EncoderConfig
from fastlens.weights.family import Family, Key
from fastlens.weights.views import bias_heads, input_heads, output_heads, transposed


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "d_head": config.get("dim", 768) // config.get("n_heads", 12),
        "encoder": EncoderConfig(n_token_types=0, heads=("mlm_head",)),
    }


B, T = "transformer.layer.{l}.", "blocks.{l}."
A = B + "attention."
KEYS: dict[str, Key | None] = {
    "embeddings.word_embeddings.weight": Key("d_vocab d_model", "embed.embed.W_E"),
    "embeddings.position_embeddings.weight": Key("n_ctx d_model", "embed.pos_embed.W_pos"),
    "embeddings.LayerNorm.weight": Key("d_model", "embed.ln.w"),
    "embeddings.LayerNorm.bias": Key("d_model", "embed.ln.b"),
    "embeddings.position_ids": None,
    A + "q_lin.weight": Key("heads d_model", T + "attn.W_Q", input_heads),
    A + "q_lin.bias": Key("heads", T + "attn.b_Q", bias_heads),
    A + "k_lin.weight": Key("heads d_model", T + "attn.W_K", input_heads),
    A + "k_lin.bias": Key("heads", T + "attn.b_K", bias_heads),
    A + "v_lin.weight": Key("heads d_model", T + "attn.W_V", input_heads),
    A + "v_lin.bias": Key("heads", T + "attn.b_V", bias_heads),
    A + "out_lin.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    A + "out_lin.bias": Key("d_model", T + "attn.b_O"),
    B + "sa_layer_norm.weight": Key("d_model", T + "ln1.w"),
    B + "sa_layer_norm.bias": Key("d_model", T + "ln1.b"),
    B + "ffn.lin1.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    B + "ffn.lin1.bias": Key("d_mlp", T + "mlp.b_in"),
    B + "ffn.lin2.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    B + "ffn.lin2.bias": Key("d_model", T + "mlp.b_out"),
    B + "output_layer_norm.weight": Key("d_model", T + "ln2.w"),
    B + "output_layer_norm.bias": Key("d_model", T + "ln2.b"),
    "vocab_transform.weight": Key("d_model d_model", "mlm_head.W", transposed),
    "vocab_transform.bias": Key("d_model", "mlm_head.b"),
    "vocab_layer_norm.weight": Key("d_model", "mlm_head.ln.w"),
    "vocab_layer_norm.bias": Key("d_model", "mlm_head.ln.b"),
    "vocab_projector.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    "vocab_projector.bias": Key("d_vocab", "unembed.b_U"),
}

FAMILY = Family(
    name="distilbert",
    architectures=("DistilBertForMaskedLM", "DistilBertModel"),
    config_class="DistilBertConfig",
    prefix="distilbert.",
    config={
        "vocab_size": ("d_vocab", 30522),
        "dim": ("d_model", 768),
        "n_layers": ("n_layers", 6),
        "n_heads": ("n_heads", 12),
        "hidden_dim": ("d_mlp", 3072),
        "activation": ("act_fn", "gelu"),
        "max_position_embeddings": ("n_ctx", 512),
    },
    fixed={
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "attention_dir": "bidirectional",
        "eps": 1e-12,
    },
    derive=_fields,
    ties_by_default=True,
    only={"pruned_heads": {}, "use_bfloat16": False, "add_cross_attention": False},
    # Sinusoidal positions are how the table was first filled; checkpoints hold it.
    ignored=frozenset(
        """attention_dropout dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds
        tie_weights_""".split()
    ),
    keys=KEYS,
    # What the hub called them before repositories had owners.
    aliases={
        f"distilbert-base-{kind}": f"distilbert/distilbert-base-{kind}"
        for kind in ("uncased", "cased", "multilingual-cased", "german-cased")
    },
    model_class="HookedEncoder",
    optional=(("mlm_head", "unembed"),),
)
