"""CamemBERT: RoBERTa's table with another vocabulary. Loaded by `HookedEncoder`."""

from dataclasses import replace

from fastlens.weights.families.roberta import FAMILY as ROBERTA

FAMILY = replace(
    ROBERTA,
    name="camembert",
    architectures=("CamembertForMaskedLM", "CamembertModel"),
    config_class="CamembertConfig",
    config={**ROBERTA.config, "vocab_size": ("d_vocab", 30522)},
    aliases={"camembert-base": "almanach/camembert-base"},
    repositories=("almanach/camembert-large",),
)
