"""ERNIE 4.5."""

from fastlens.weights.families.ernie4_5 import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN


class TestErnie(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": {**LLAMA, "head_dim": 12},
        "full": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": False, "head_dim": 8},
        "single": {**LLAMA, "num_key_value_heads": 1, "head_dim": None, "rope_parameters": YARN},
    }


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["Ernie4_5ForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (2, 131072, 128)
    assert (fields["rotary_base"], fields["rotary_adjacent_pairs"]) == (500000.0, True)
