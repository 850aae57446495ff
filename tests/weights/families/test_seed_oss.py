"""Seed-OSS."""

from fastlens.weights.families.seed_oss import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN


class TestSeedOss(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": {**LLAMA, "head_dim": 12},
        "full": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": None,
                 "attention_bias": False},
        "single": {**LLAMA, "num_key_value_heads": 1, "head_dim": 8, "attention_out_bias": True,
                   "rope_parameters": YARN},
    }  # fmt: skip


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["SeedOssForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (8, 524288, 128)
