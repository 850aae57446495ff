"""Mistral: Llama's tensors under its own defaults, and the sliding window."""

import pytest

from fastlens.errors import ConfigError, WeightsError
from fastlens.weights.families.mistral import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import cases_of, hf_model, save_folder
from tests.weights.families.facts import (
    check_aliases,
    check_same_as_transformerlens,
)
from tests.weights.families.generated import FamilyTests


class TestMistral(FamilyTests):
    family = FAMILY
    cases = cases_of(FAMILY.name)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "mistral-7b", "nemo", "small-24b") > 6


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions import convert_mistral_weights

    check_same_as_transformerlens("mistral_window", convert_mistral_weights)


def test_the_window():
    fields = open_source("x", hf_model=hf_model("mistral_window")).config_fields()
    assert (fields["use_local_attn"], fields["window_size"]) == (True, 4)
    assert fields["attn_types"] == ["local"] * 3
    plain = open_source("x", hf_model=hf_model("mistral_plain")).config_fields()
    assert "use_local_attn" not in plain


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["MistralForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["window_size"]) == (8, 4096)
    assert (fields["n_ctx"], fields["d_mlp"], fields["d_head"]) == (131072, 14336, 128)


def test_a_window_with_linear_scaling_is_refused(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    folder = save_folder(tmp_path, "mistral_window", rope_parameters=rope)
    with pytest.raises(ConfigError, match="sliding_window=4 and linear rotary scaling"):
        open_source(folder)


def test_biases_are_unknown(tmp_path):
    folder = save_folder(tmp_path, "llama_biased", architectures=["MistralForCausalLM"],
                         attention_bias=None, mlp_bias=None, pretraining_tp=None)  # fmt: skip
    with pytest.raises(WeightsError, match=r"unknown: model\.layers\.0\.self_attn\.q_proj\.bias"):
        open_source(folder)
