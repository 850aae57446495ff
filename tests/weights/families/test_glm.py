"""GLM."""

from fastlens.weights.families.glm import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN

GLM = {**LLAMA, "head_dim": 8}


class TestGlm(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": GLM,
        "full": {**GLM, "num_key_value_heads": 4, "attention_bias": False,
                 "tie_word_embeddings": True},
        "single": {**GLM, "num_key_value_heads": 1, "head_dim": 12,
                   "rope_parameters": {"rope_type": "default", "rope_theta": 500.0,
                                       "partial_rotary_factor": 1.0}},
        "yarn": {**GLM, "head_dim": 16, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    }  # fmt: skip


def test_published_configs():
    """GLM-4-9B, and the share of rotated channels where the config says it."""
    fields = FAMILY.config_fields({"partial_rotary_factor": 0.5, "rope_theta": 10000.0})
    assert (fields["d_head"], fields["rotary_dim"], fields["n_key_value_heads"]) == (128, 64, 2)
    assert fields["rotary_adjacent_pairs"] and not fields["default_prepend_bos"]
    assert FAMILY.config_fields({"partial_rotary_factor": 1.0})["rotary_dim"] == 128
