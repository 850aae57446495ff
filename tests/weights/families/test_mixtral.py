"""Mixtral."""

import pytest

from fastlens.weights.families.mixtral import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.mixtures import MIXTURE, MixtureTests
from tests.weights.families.tiny import random_model

MIXTRAL = {**MIXTURE, "num_local_experts": 5}


class TestMixtral(MixtureTests):
    family = FAMILY
    cases = {
        "grouped": MIXTRAL,
        "full": {**MIXTRAL, "num_key_value_heads": 4, "num_local_experts": 2},
        "single": {**MIXTRAL, "num_key_value_heads": 1, "num_experts_per_tok": 1},
        "window": {**MIXTRAL, "sliding_window": 4, "tie_word_embeddings": True},
    }


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["MixtralForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["rotary_base"]) == (8, 131072, 1e6)
    assert (fields["num_experts"], fields["experts_per_token"]) == (8, 2)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "mixtral", "instruct", "8x7b") >= 4


@pytest.mark.tl
@pytest.mark.parametrize("case", ["grouped", "full"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions import convert_mixtral_weights

    check_same_as_transformerlens(random_model(TestMixtral, case), convert_mixtral_weights)
