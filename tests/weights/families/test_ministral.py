"""Ministral."""

from fastlens.weights.families.ministral import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN

KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MINISTRAL = {**LLAMA, "head_dim": 12}


class TestMinistral(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": {**MINISTRAL, "sliding_window": 4, "layer_types": KINDS},
        "full": {**MINISTRAL, "num_key_value_heads": 4, "tie_word_embeddings": True,
                 "layer_types": ["full_attention"] * 3},
        "single": {**MINISTRAL, "num_key_value_heads": 1, "sliding_window": 5,
                   "rope_parameters": YARN},
    }  # fmt: skip


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["MinistralForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["window_size"]) == (8, 4096)
    assert fields["attn_types"] == ["local"] * 32
