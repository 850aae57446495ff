"""Cohere."""

import pytest

from fastlens.weights.families.cohere import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN

# Logits of a tiny model are small before they are scaled.
COHERE = {**LLAMA, "logit_scale": 0.5}


class TestCohere(FamilyTests):
    family = FAMILY
    cases = {
        "full": {**COHERE, "num_key_value_heads": None},
        "normed": {**COHERE, "use_qk_norm": True, "tie_word_embeddings": False},
        "normed full": {**COHERE, "use_qk_norm": True, "num_key_value_heads": 4},
        "single": {**COHERE, "num_key_value_heads": 1, "attention_bias": True,
                   "rope_parameters": YARN},
    }  # fmt: skip


def test_published_configs():
    """Command R: what it does not say is the default."""
    fields = FAMILY.config_fields(
        {"hidden_size": 8192, "num_key_value_heads": 64, "rope_theta": 8000000.0,
         "max_position_embeddings": 8192, "model_max_length": 131072, "use_qk_norm": None}
    )  # fmt: skip
    assert (fields["rotary_base"], fields["d_head"]) == (8000000.0, 128)
    assert fields["rotary_adjacent_pairs"] and fields["parallel_attn_mlp"]
    assert FAMILY.config_fields({})["rotary_base"] == 500000.0


@pytest.mark.parametrize("stated", [{}, {"logit_scale": 0.25}])
def test_logit_scale_is_in_the_unembedding_alone(stated):
    assert FAMILY.factors["unembed.W_U"](stated) == stated.get("logit_scale", 0.0625)
    assert list(FAMILY.factors) == ["unembed.W_U"]
