"""Megatron-BERT: BERT with norms before its sublayers (Shoeybi et al. 1909.08053)."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import bert
from fastlens.weights.family import Key


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return bert.encoder_fields(
        config,
        d_model=1024,
        n_heads=16,
        pre_norm=True,
        embedding_norm=False,
        n_token_types=config.get("type_vocab_size", 2),
    )


B, T = "encoder.layer.{l}.", "blocks.{l}."
KEYS: dict[str, Key | None] = {
    **{
        name: key
        for name, key in bert.KEYS.items()
        if "LayerNorm" not in name or "transform" in name
    },
    B + "attention.ln.weight": Key("d_model", T + "ln1.w"),
    B + "attention.ln.bias": Key("d_model", T + "ln1.b"),
    B + "ln.weight": Key("d_model", T + "ln2.w"),
    B + "ln.bias": Key("d_model", T + "ln2.b"),
    "encoder.ln.weight": Key("d_model", "ln_final.w"),
    "encoder.ln.bias": Key("d_model", "ln_final.b"),
}

FAMILY = replace(
    bert.FAMILY,
    name="megatron-bert",
    architectures=(
        "MegatronBertForMaskedLM",
        "MegatronBertForPreTraining",
        "MegatronBertForNextSentencePrediction",
        "MegatronBertModel",
    ),
    config_class="MegatronBertConfig",
    config={
        **bert.FAMILY.config,
        "vocab_size": ("d_vocab", 29056),
        "hidden_size": ("d_model", 1024),
        "num_hidden_layers": ("n_layers", 24),
        "num_attention_heads": ("n_heads", 16),
        "intermediate_size": ("d_mlp", 4096),
    },
    derive=_fields,
    keys=KEYS,
    aliases={},
)
