"""BERT: encoders with post-norms, with or without their heads. Loaded by `HookedEncoder`."""

from typing import Any

from fastlens.config import EncoderConfig
from fastlens.errors import ConfigError
from fastlens.weights.family import Family, Key
from fastlens.weights.views import (
    bias_heads,
    input_heads,
    output_heads,
    transposed,
)


def encoder_fields(
    config: dict[str, Any], d_model: int = 768, n_heads: int = 12, **differences: Any
) -> dict[str, Any]:
    """Head size and `EncoderConfig` of an encoder that is like BERT but for these differences.

    Args:
        d_model, n_heads: The family's defaults.
    """
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise ConfigError(
            "this BERT is a decoder (is_decoder or add_cross_attention in its config), which is "
            "not computed here. HookedEncoder takes encoders."
        )
    d_model, n_heads = (
        config.get("hidden_size", d_model),
        config.get("num_attention_heads", n_heads),
    )
    return {"d_head": d_model // n_heads, "encoder": EncoderConfig(**differences)}


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return encoder_fields(config, n_token_types=config.get("type_vocab_size", 2))


B, T = "encoder.layer.{l}.", "blocks.{l}."
S, P = B + "attention.self.", "cls.predictions."
# What BERT's kin have too.
BODY: dict[str, Key | None] = {
    "embeddings.word_embeddings.weight": Key("d_vocab d_embed", "embed.embed.W_E"),
    "embeddings.position_embeddings.weight": Key("positions d_embed", "embed.pos_embed.W_pos"),
    "embeddings.token_type_embeddings.weight": Key(
        "token_types d_embed", "embed.token_type_embed.W_token_type"
    ),
    "embeddings.LayerNorm.weight": Key("d_embed", "embed.ln.w"),
    "embeddings.LayerNorm.bias": Key("d_embed", "embed.ln.b"),
    "embeddings.position_ids": None,
    "embeddings.token_type_ids": None,
    S + "query.weight": Key("heads d_model", T + "attn.W_Q", input_heads),
    S + "query.bias": Key("heads", T + "attn.b_Q", bias_heads),
    S + "key.weight": Key("heads d_model", T + "attn.W_K", input_heads),
    S + "key.bias": Key("heads", T + "attn.b_K", bias_heads),
    S + "value.weight": Key("heads d_model", T + "attn.W_V", input_heads),
    S + "value.bias": Key("heads", T + "attn.b_V", bias_heads),
    B + "attention.output.dense.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    B + "attention.output.dense.bias": Key("d_model", T + "attn.b_O"),
    B + "attention.output.LayerNorm.weight": Key("d_model", T + "ln1.w"),
    B + "attention.output.LayerNorm.bias": Key("d_model", T + "ln1.b"),
    B + "intermediate.dense.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    B + "intermediate.dense.bias": Key("d_mlp", T + "mlp.b_in"),
    B + "output.dense.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    B + "output.dense.bias": Key("d_model", T + "mlp.b_out"),
    B + "output.LayerNorm.weight": Key("d_model", T + "ln2.w"),
    B + "output.LayerNorm.bias": Key("d_model", T + "ln2.b"),
    "pooler.dense.weight": Key("d_model d_model", "pooler.W", transposed),
    "pooler.dense.bias": Key("d_model", "pooler.b"),
}
# In order: of two names of one parameter, the first is read.
KEYS: dict[str, Key | None] = {
    **BODY,
    P + "transform.dense.weight": Key("d_model d_model", "mlm_head.W", transposed),
    P + "transform.dense.bias": Key("d_model", "mlm_head.b"),
    P + "transform.LayerNorm.weight": Key("d_model", "mlm_head.ln.w"),
    P + "transform.LayerNorm.bias": Key("d_model", "mlm_head.ln.b"),
    P + "decoder.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    # The decoder's own where it is not tied to the other, which then is not used.
    P + "decoder.bias": Key("d_vocab", "unembed.b_U"),
    P + "bias": Key("d_vocab", "unembed.b_U"),
    "cls.seq_relationship.weight": Key("two d_model", "nsp_head.W", transposed),
    "cls.seq_relationship.bias": Key("two", "nsp_head.b"),
}


def tensorflow_names(keys: dict[str, Key | None]) -> dict[str, Key | None]:
    """Norms as checkpoints call them that came from TensorFlow, bert-base-uncased among them."""
    return {
        name.replace(".weight", ".gamma").replace(".bias", ".beta"): key
        for name, key in keys.items()
        if "LayerNorm." in name
    }


KEYS |= tensorflow_names(KEYS)
# None in eval mode; the pooler_* ones are for multilingual BERT's unused TensorFlow pooler.
IGNORED = frozenset(
    """hidden_dropout_prob attention_probs_dropout_prob classifier_dropout directionality
    pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type""".split()
)

FAMILY = Family(
    name="bert",
    architectures=(
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertForNextSentencePrediction",
        "BertModel",
    ),
    config_class="BertConfig",
    prefix="bert.",
    config={
        "vocab_size": ("d_vocab", 30522),
        "hidden_size": ("d_model", 768),
        "num_hidden_layers": ("n_layers", 12),
        "num_attention_heads": ("n_heads", 12),
        "intermediate_size": ("d_mlp", 3072),
        "hidden_act": ("act_fn", "gelu"),
        "max_position_embeddings": ("n_ctx", 512),
        "layer_norm_eps": ("eps", 1e-12),
    },
    fixed={
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "attention_dir": "bidirectional",
    },
    derive=_fields,
    ties_by_default=True,
    only={
        "position_embedding_type": "absolute",
        "pruned_heads": {},
        "use_bfloat16": False,
    },
    reads=frozenset({"add_cross_attention", "type_vocab_size"}),
    ignored=IGNORED,
    keys=KEYS,
    aliases={
        f"bert-{size}-{case}": f"google-bert/bert-{size}-{case}"
        for size in ("base", "large")
        for case in ("cased", "uncased")
    },
    model_class="HookedEncoder",
    optional=(("mlm_head", "unembed"), ("pooler",), ("nsp_head",)),
)
