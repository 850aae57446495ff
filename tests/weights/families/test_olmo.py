"""OLMo 1."""

import pytest

from fastlens.weights.families.olmo import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN, random_model


class TestOlmo(FamilyTests):
    family = FAMILY
    cases = {
        "full": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True},
        # Small enough that many queries, keys and values are clipped.
        "clipped": {**LLAMA, "num_key_value_heads": 4, "clip_qkv": 0.5},
        "grouped": {**LLAMA, "rope_parameters": YARN},
        "single": {**LLAMA, "num_key_value_heads": 1, "attention_bias": True, "clip_qkv": 0.5},
    }


def test_published_configs():
    """OLMo 1.7 7B."""
    fields = FAMILY.config_fields({"clip_qkv": 8.0, "rope_theta": 10000.0, "rope_scaling": None})
    assert (fields["clip_qkv"], fields["eps"], fields["d_head"]) == (8.0, 1e-5, 128)
    assert fields["normalization_type"] == "LN"


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "olmo-") == 4


@pytest.mark.tl
@pytest.mark.parametrize("case", ["full", "clipped"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions.olmo import convert_olmo_weights

    check_same_as_transformerlens(random_model(TestOlmo, case), convert_olmo_weights)
