"""ESM-2 and ESM-1b: encoders of proteins with norms before sublayers. By `HookedEncoder`."""

from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.families import bert
from fastlens.weights.family import Family, Key
from fastlens.weights.views import transposed


def _has_norm(config: dict[str, Any]) -> bool:
    return bool(config.get("emb_layer_norm_before"))


def _learns_positions(config: dict[str, Any]) -> bool:
    return config.get("position_embedding_type", "absolute") != "rotary"


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    learned, padding = _learns_positions(config), config.get("pad_token_id")
    kind = config.get("position_embedding_type", "absolute")
    if kind not in ("absolute", "rotary"):
        raise ConfigError(f"position_embedding_type={kind!r} must be 'absolute' or 'rotary'.")
    if learned and padding is None:
        raise ConfigError(
            "pad_token_id is null in the config, but positions are counted from it. ESM-1b's is 1."
        )
    drops = config.get("token_dropout") or False
    if drops and config.get("mask_token_id") is None:
        raise ConfigError("token_dropout is set, but mask_token_id is not. ESM-2's is 32.")
    fields = bert.encoder_fields(
        config,
        pre_norm=True,
        n_token_types=0,
        heads=("mlm_head", "pooler"),
        embedding_norm=_has_norm(config),
        dropped_token=config["mask_token_id"] if drops else None,
        zeroes_padding=True,
        padding_id=padding if learned else None,
    )
    if not learned:
        return {**fields, "rotary_base": config.get("rope_theta", 10000.0)}
    # Rows of the table up to the padding token's stand for no position.
    n_ctx = config.get("max_position_embeddings", 1026) - padding - 1
    return {**fields, "n_ctx": n_ctx, "positional_embedding_type": "standard"}


B, T = "encoder.layer.{l}.", "blocks.{l}."
INV_FREQ = "attention.self.rotary_embeddings.inv_freq"
# BERT's names but for the norms.
KEPT = (
    bert.S,
    B + "attention.output.dense",
    B + "intermediate.dense",
    B + "output.dense",
    "pooler.",
)
KEYS: dict[str, Key | None] = {
    "embeddings.word_embeddings.weight": Key("d_vocab d_model", "embed.embed.W_E"),
    "embeddings.layer_norm.weight": Key("d_model", "embed.ln.w", when=_has_norm),
    "embeddings.layer_norm.bias": Key("d_model", "embed.ln.b", when=_has_norm),
    "embeddings.position_ids": None,
    # Released with ESM-2 too, and not used by it.
    "embeddings.position_embeddings.weight": Key(
        "positions d_model", "embed.pos_embed.W_pos", when=_learns_positions, spare=True
    ),
    # Rounded to 16 bits in some checkpoints; transformers, too, takes those of the first layer.
    "rotary_embeddings.inv_freq": Key("frequencies", "rotary.frequencies"),
    f"encoder.layer.0.{INV_FREQ}": Key("frequencies", "rotary.frequencies"),
    # With a star, as transformers 5 saves them.
    f"encoder.layer.*.{INV_FREQ}": Key("frequencies", "rotary.frequencies"),
    B + INV_FREQ: None,
    **{name: key for name, key in bert.BODY.items() if name.startswith(KEPT)},
    B + "attention.LayerNorm.weight": Key("d_model", T + "ln1.w"),
    B + "attention.LayerNorm.bias": Key("d_model", T + "ln1.b"),
    B + "LayerNorm.weight": Key("d_model", T + "ln2.w"),
    B + "LayerNorm.bias": Key("d_model", T + "ln2.b"),
    "encoder.emb_layer_norm_after.weight": Key("d_model", "ln_final.w"),
    "encoder.emb_layer_norm_after.bias": Key("d_model", "ln_final.b"),
    # Contacts are predicted from the attention of all layers, by no part of ours.
    "contact_head.regression.weight": None,
    "contact_head.regression.bias": None,
    "lm_head.dense.weight": Key("d_model d_model", "mlm_head.W", transposed),
    "lm_head.dense.bias": Key("d_model", "mlm_head.b"),
    "lm_head.layer_norm.weight": Key("d_model", "mlm_head.ln.w"),
    "lm_head.layer_norm.bias": Key("d_model", "mlm_head.ln.b"),
    "lm_head.decoder.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    "lm_head.bias": Key("d_vocab", "unembed.b_U"),
}

# Also saved by transformers 5.
KEYS |= bert.tensorflow_names(KEYS)

FAMILY = Family(
    name="esm",
    architectures=("EsmForMaskedLM", "EsmModel"),
    config_class="EsmConfig",
    prefix="esm.",
    config={
        "vocab_size": ("d_vocab", None),
        "hidden_size": ("d_model", 768),
        "num_hidden_layers": ("n_layers", 12),
        "num_attention_heads": ("n_heads", 12),
        "intermediate_size": ("d_mlp", 3072),
        "max_position_embeddings": ("n_ctx", 1026),
        "layer_norm_eps": ("eps", 1e-12),
    },
    fixed={
        "normalization_type": "LN",
        "positional_embedding_type": "rotary",
        "attention_dir": "bidirectional",
        "act_fn": "gelu",
    },
    derive=_fields,
    ties_by_default=True,
    only={"is_folding_model": False, "hidden_act": "gelu", "use_bfloat16": False},
    reads=frozenset(
        """add_cross_attention emb_layer_norm_before mask_token_id position_embedding_type
        rope_theta token_dropout""".split()
    ),
    ignored=frozenset(
        "attention_probs_dropout_prob classifier_dropout hidden_dropout_prob vocab_list".split()
    ),
    keys=KEYS,
    repositories=(
        *(
            f"facebook/esm2_{size}_UR50D"
            for size in ("t6_8M", "t12_35M", "t30_150M", "t33_650M", "t36_3B", "t48_15B")
        ),
        "facebook/esm1b_t33_650M_UR50S",
        *(f"facebook/esm1v_t33_650M_UR90S_{seed}" for seed in range(1, 6)),
    ),
    model_class="HookedEncoder",
    optional=(("mlm_head", "unembed"), ("pooler",), ("rotary",)),
)
