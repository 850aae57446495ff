"""OLMoE."""

import pytest

from fastlens.weights.families.olmoe import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.mixtures import MIXTURE, MixtureTests
from tests.weights.families.tiny import random_model

OLMOE = {**MIXTURE, "num_experts": 6, "num_experts_per_tok": 3}


class TestOlmoe(MixtureTests):
    family = FAMILY
    cases = {
        "full": {**OLMOE, "num_key_value_heads": 4},
        "grouped": {**OLMOE, "norm_topk_prob": True},
        "single": {**OLMOE, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "clipped": {**OLMOE, "clip_qkv": 0.7, "attention_bias": True},
    }


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["OlmoeForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (16, 4096, 128)
    assert (fields["use_qk_norm"], fields["qk_norm_kind"]) == (True, "joined")


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "olmoe") >= 1


@pytest.mark.tl
@pytest.mark.parametrize("case", ["full", "grouped"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions import convert_olmoe_weights

    check_same_as_transformerlens(random_model(TestOlmoe, case), convert_olmoe_weights)
