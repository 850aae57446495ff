"""Nemotron and Minitron."""

from fastlens.weights.families.nemotron import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA

WHOLE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}


class TestNemotron(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": LLAMA,
        "full": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 12},
        "single": {**LLAMA, "num_key_value_heads": 1, "rope_parameters": WHOLE},
        "biased": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    }


def test_the_share_of_rotated_channels():
    fields = FAMILY.config_fields({"rope_theta": 10000.0, "hidden_size": 3072, "head_dim": 128})
    assert (fields["d_head"], fields["rotary_dim"]) == (128, 64)
    assert FAMILY.config_fields({"partial_rotary_factor": 0.25})["rotary_dim"] == 32
