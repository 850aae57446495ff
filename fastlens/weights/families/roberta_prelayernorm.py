"""RoBERTa with norms before its sublayers (Wettig et al. 2202.08005). By `HookedEncoder`."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import roberta
from fastlens.weights.family import Key


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    fields = roberta.fields(config)
    return {**fields, "encoder": replace(fields["encoder"], pre_norm=True)}


B, T = "encoder.layer.{l}.", "blocks.{l}."
KEYS: dict[str, Key | None] = {
    **{name: key for name, key in roberta.KEYS.items() if "output.LayerNorm" not in name},
    B + "attention.LayerNorm.weight": Key("d_model", T + "ln1.w"),
    B + "attention.LayerNorm.bias": Key("d_model", T + "ln1.b"),
    B + "intermediate.LayerNorm.weight": Key("d_model", T + "ln2.w"),
    B + "intermediate.LayerNorm.bias": Key("d_model", T + "ln2.b"),
    "LayerNorm.weight": Key("d_model", "ln_final.w"),
    "LayerNorm.bias": Key("d_model", "ln_final.b"),
}

FAMILY = replace(
    roberta.FAMILY,
    name="roberta-prelayernorm",
    architectures=("RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormModel"),
    config_class="RobertaPreLayerNormConfig",
    prefix="roberta_prelayernorm.",
    derive=_fields,
    keys=KEYS,
    aliases={},
    repositories=tuple(
        f"andreasmadsen/efficient_mlm_m0.{share}" for share in (15, 20, 30, 40, 50, 60, 70, 80)
    ),
)
