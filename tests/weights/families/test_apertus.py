"""Apertus."""

import copy

import pytest

from fastlens.errors import ConfigError, WeightsError
from fastlens.weights.families.apertus import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import weights_of
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, LLAMA3, random_model


class TestApertus(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": LLAMA,
        "full": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "single": {**LLAMA, "num_key_value_heads": 1, "rope_parameters": LLAMA3},
        "biased": {**LLAMA, "attention_bias": True, "hidden_act": "silu"},
    }


def test_rotary_parameters_that_are_not_stated():
    for config in ({}, {"rope_theta": 12000000.0}):
        fields = FAMILY.config_fields(config)
        assert (fields["rotary_base"], fields["NTK_by_parts_factor"]) == (12000000.0, 8.0)
    # Versions of transformers read this in two ways.
    with pytest.raises(ConfigError, match="transformers 4 computes that"):
        FAMILY.config_fields({"rope_theta": 10000.0})
    stated = {"rope_type": "default", "rope_theta": 10000.0}
    assert FAMILY.config_fields({"rope_parameters": stated})["rotary_base"] == 10000.0


def test_other_constants_of_xielu_are_refused():
    model = copy.deepcopy(random_model(TestApertus, "grouped"))
    model.bfloat16()
    assert weights_of(open_source("x", hf_model=model))
    model.model.layers[1].mlp.act_fn.beta.fill_(0.6)
    with pytest.raises(WeightsError, match="where xIELU has its constant 0.5"):
        weights_of(open_source("x", hf_model=model))


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "apertus-8b", "instruct") == 6


@pytest.mark.tl
@pytest.mark.parametrize("case", ["grouped", "full", "single"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions.apertus import convert_apertus_weights

    def convert(model, cfg):
        theirs = convert_apertus_weights(model, cfg)
        # A constant; and numbers that are lists of one there.
        dropped = [name for name in theirs if name.endswith("act_fn.beta")]
        assert all(theirs.pop(name) == 0.5 for name in dropped)
        return {name: t.squeeze(0) if "alpha" in name else t for name, t in theirs.items()}

    check_same_as_transformerlens(random_model(TestApertus, case), convert)
