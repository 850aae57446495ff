"""Arcee AFM."""

from fastlens.weights.families.arcee import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN


class TestArcee(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": {**LLAMA, "rope_parameters": YARN},
        "full": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 12},
        "single": {**LLAMA, "num_key_value_heads": 1},
        "biased": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    }


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["ArceeForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (None, 4096, 80)
