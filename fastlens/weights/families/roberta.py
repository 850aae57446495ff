"""RoBERTa: BERT whose positions leave out padding. Loaded by `HookedEncoder`."""

from dataclasses import replace
from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.families import bert
from fastlens.weights.family import Key
from fastlens.weights.views import transposed


def fields(config: dict[str, Any]) -> dict[str, Any]:
    """Head size, positions and `EncoderConfig`.

    Raises: ConfigError without a padding token, from which positions are counted.
    """
    padding = config.get("pad_token_id", 1)
    if padding is None:
        raise ConfigError(
            "pad_token_id is null in the config, but positions are counted from it. RoBERTa's is 1."
        )
    like_bert = bert.encoder_fields(
        config,
        n_token_types=config.get("type_vocab_size", 2),
        padding_id=padding,
        heads=("mlm_head", "pooler"),
        # Whatever hidden_act is.
        head_act_fn="gelu",
    )
    # Rows of the position table, of which those up to the padding token's stand for no position.
    rows = config.get("max_position_embeddings", 512)
    return {**like_bert, "n_ctx": rows - padding - 1}


KEYS: dict[str, Key | None] = {
    **bert.BODY,
    "lm_head.dense.weight": Key("d_model d_model", "mlm_head.W", transposed),
    "lm_head.dense.bias": Key("d_model", "mlm_head.b"),
    "lm_head.layer_norm.weight": Key("d_model", "mlm_head.ln.w"),
    "lm_head.layer_norm.bias": Key("d_model", "mlm_head.ln.b"),
    "lm_head.decoder.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    "lm_head.decoder.bias": Key("d_vocab", "unembed.b_U"),
    "lm_head.bias": Key("d_vocab", "unembed.b_U"),
}

FAMILY = replace(
    bert.FAMILY,
    name="roberta",
    architectures=("RobertaForMaskedLM", "RobertaModel"),
    config_class="RobertaConfig",
    prefix="roberta.",
    config={
        **{
            theirs: ours
            for theirs, ours in bert.FAMILY.config.items()
            if theirs != "max_position_embeddings"
        },
        "vocab_size": ("d_vocab", 50265),
    },
    derive=fields,
    reads=bert.FAMILY.reads | {"max_position_embeddings"},
    keys=KEYS,
    # What the hub called them before repositories had owners.
    aliases={
        "roberta-base": "FacebookAI/roberta-base",
        "roberta-large": "FacebookAI/roberta-large",
        "distilroberta-base": "distilbert/distilroberta-base",
    },
    optional=(("mlm_head", "unembed"), ("pooler",)),
)
