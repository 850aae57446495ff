"""XLM-RoBERTa: RoBERTa's table with another vocabulary. Loaded by `HookedEncoder`."""

from dataclasses import replace

from fastlens.weights.families.roberta import FAMILY as ROBERTA

FAMILY = replace(
    ROBERTA,
    name="xlm-roberta",
    architectures=("XLMRobertaForMaskedLM", "XLMRobertaModel"),
    config_class="XLMRobertaConfig",
    config={**ROBERTA.config, "vocab_size": ("d_vocab", 30522)},
    aliases={f"xlm-roberta-{size}": f"FacebookAI/xlm-roberta-{size}" for size in ("base", "large")},
)
