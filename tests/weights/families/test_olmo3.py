"""OLMo 3."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.olmo3 import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN, random_model

OLMO3 = {**LLAMA, "sliding_window": 4, "num_hidden_layers": 4}
YARN_IN_GLOBAL = {
    "full_attention": YARN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}


class TestOlmo3(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": {**OLMO3, "rope_parameters": YARN_IN_GLOBAL},
        "full": {**OLMO3, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "single": {
            **OLMO3, "num_key_value_heads": 1, "attention_bias": True, "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "alike": {**OLMO3, "rope_parameters": dict.fromkeys(YARN_IN_GLOBAL, YARN)},
    }  # fmt: skip


def test_published_configs():
    """OLMo 3 7B as it was published for an older transformers."""
    scaling = {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836,
               "beta_fast": 32.0, "beta_slow": 1.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    fields = FAMILY.config_fields(
        {"max_position_embeddings": 65536, "rope_theta": 500000, "rope_scaling": scaling}
    )
    assert fields["yarn_global_attn_only"] and fields["yarn_attention_factor"] > 1.2
    assert fields["attn_types"] == ["local", "local", "local", "global"] * 8
    assert (fields["rotary_base"], fields["window_size"]) == (500000, 4096)
    assert "rotary_base_local" not in fields


def test_scalings_that_windowed_layers_cannot_have_are_refused():
    linear = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ConfigError, match="'default' was asked for global layers and 'linear'"):
        FAMILY.config_fields({"rope_parameters": {"sliding_attention": linear}})
    with pytest.raises(ConfigError, match="Nest it"):
        FAMILY.config_fields({"rope_parameters": linear})


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "olmo-3") == 14


@pytest.mark.tl
@pytest.mark.parametrize("case", ["grouped", "full", "alike"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions.olmo3 import convert_olmo3_weights

    check_same_as_transformerlens(random_model(TestOlmo3, case), convert_olmo3_weights)
