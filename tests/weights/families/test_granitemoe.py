"""Granite 3 with mixtures of experts."""

from fastlens.weights.families.granitemoe import FAMILY
from tests.weights.families.mixtures import MIXTURE, MixtureTests

GRANITE = {**MIXTURE, "num_local_experts": 5, "embedding_multiplier": 3.0, "logits_scaling": 0.5,
           "residual_multiplier": 0.7, "attention_multiplier": 0.4}  # fmt: skip


class TestGraniteMoe(MixtureTests):
    family = FAMILY
    cases = {
        "grouped": GRANITE,
        "full": {**GRANITE, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "single": {**GRANITE, "num_key_value_heads": 1, "attention_bias": True},
    }


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["GraniteMoeForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["attn_scale"]) == (None, 2048, 1.0)
    assert (fields["num_experts"], fields["experts_per_token"]) == (8, 2)
