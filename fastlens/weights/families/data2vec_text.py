"""data2vec for text: RoBERTa's table under another name. Loaded by `HookedEncoder`."""

from dataclasses import replace

from fastlens.weights.families.roberta import FAMILY as ROBERTA

FAMILY = replace(
    ROBERTA,
    name="data2vec-text",
    architectures=("Data2VecTextForMaskedLM", "Data2VecTextModel"),
    config_class="Data2VecTextConfig",
    prefix="data2vec_text.",
    config={**ROBERTA.config, "vocab_size": ("d_vocab", 30522)},
    aliases={},
    repositories=("facebook/data2vec-text-base",),
)
