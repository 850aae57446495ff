"""Granite 3."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.granite import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN

GRANITE = {
    **LLAMA, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
    "attention_multiplier": 0.3, "logits_scaling": 8.0,
}  # fmt: skip


class TestGranite(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": GRANITE,
        "full": {**GRANITE, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "single": {**GRANITE, "num_key_value_heads": 1, "rope_parameters": YARN},
        "biased": {**GRANITE, "attention_bias": True},
        "plain": LLAMA,
    }


def test_multipliers_that_divide_by_nothing_are_refused():
    with pytest.raises(ConfigError, match="must be positive"):
        FAMILY.config_fields({"attention_multiplier": 0.0})
