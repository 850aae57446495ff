"""OLMo 2."""

import pytest

from fastlens.weights.families.olmo2 import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, LLAMA3, YARN, random_model


class TestOlmo2(FamilyTests):
    family = FAMILY
    cases = {
        "full": {**LLAMA, "num_key_value_heads": 4},
        "grouped": {**LLAMA, "rope_parameters": YARN, "tie_word_embeddings": True},
        "single": {**LLAMA, "num_key_value_heads": 1, "rope_parameters": LLAMA3},
        "biased": {**LLAMA, "attention_bias": True},
    }


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "olmo-2-") == 4


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions.olmo2 import convert_olmo2_weights

    check_same_as_transformerlens(random_model(TestOlmo2, "full"), convert_olmo2_weights)
