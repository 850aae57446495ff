"""ELECTRA: BERT's blocks, narrower embeddings, a generator's or a discriminator's head."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import bert
from fastlens.weights.family import Key
from fastlens.weights.views import transposed


def _projects(config: dict[str, Any]) -> bool:
    return config.get("embedding_size", 128) != config.get("hidden_size", 256)


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return bert.encoder_fields(
        config,
        d_model=256,
        n_heads=4,
        n_token_types=config.get("type_vocab_size", 2),
        d_embed=config.get("embedding_size", 128) if _projects(config) else None,
        heads=("mlm_head", "rtd_head"),
        # Whatever hidden_act is.
        head_act_fn="gelu",
    )


G, D = "generator_predictions.", "discriminator_predictions."
KEYS: dict[str, Key | None] = {
    **{name: key for name, key in bert.BODY.items() if not name.startswith("pooler.")},
    "embeddings_project.weight": Key("d_model d_embed", "embed.W_proj", transposed, when=_projects),
    "embeddings_project.bias": Key("d_model", "embed.b_proj", when=_projects),
    G + "dense.weight": Key("d_embed d_model", "mlm_head.W", transposed),
    G + "dense.bias": Key("d_embed", "mlm_head.b"),
    G + "LayerNorm.weight": Key("d_embed", "mlm_head.ln.w"),
    G + "LayerNorm.bias": Key("d_embed", "mlm_head.ln.b"),
    "generator_lm_head.weight": Key("d_vocab d_embed", "unembed.W_U", transposed),
    "generator_lm_head.bias": Key("d_vocab", "unembed.b_U"),
    D + "dense.weight": Key("d_model d_model", "rtd_head.W", transposed),
    D + "dense.bias": Key("d_model", "rtd_head.b"),
    D + "dense_prediction.weight": Key("1 d_model", "rtd_head.W_out", transposed),
    D + "dense_prediction.bias": Key("1", "rtd_head.b_out"),
}

FAMILY = replace(
    bert.FAMILY,
    name="electra",
    architectures=("ElectraForMaskedLM", "ElectraForPreTraining", "ElectraModel"),
    config_class="ElectraConfig",
    prefix="electra.",
    config={
        **bert.FAMILY.config,
        "hidden_size": ("d_model", 256),
        "num_attention_heads": ("n_heads", 4),
        "intermediate_size": ("d_mlp", 1024),
    },
    derive=_fields,
    reads=bert.FAMILY.reads | {"embedding_size"},
    # What sequence classification alone reads.
    ignored=bert.IGNORED
    | {"summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout"},
    keys=KEYS,
    aliases={},
    repositories=tuple(
        f"google/electra-{size}-{part}"
        for size in ("small", "base", "large")
        for part in ("generator", "discriminator")
    ),
    optional=(("mlm_head", "unembed"), ("rtd_head",)),
)
