"""Helium."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.helium import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA

HELIUM = {**LLAMA, "head_dim": 8}


class TestHelium(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": HELIUM,
        "full": {**HELIUM, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "single": {**HELIUM, "num_key_value_heads": 1, "attention_bias": True},
    }


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["HeliumForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (None, 4096, 128)
    assert (fields["rotary_base"], fields["eps"]) == (100000.0, 1e-8)


def test_heads_that_do_not_fill_the_model_are_refused():
    with pytest.raises(ConfigError, match="20 heads of 64 channels in a model of 2560"):
        FAMILY.config_fields({"head_dim": 64})
