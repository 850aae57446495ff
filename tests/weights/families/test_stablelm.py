"""StableLM."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.stablelm import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA

WHOLE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}


class TestStableLm(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": LLAMA,
        "full": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True,
                 "use_qkv_bias": True},
        "single": {**LLAMA, "num_key_value_heads": 1, "rope_parameters": WHOLE},
    }  # fmt: skip


def test_the_share_of_rotated_channels():
    assert FAMILY.config_fields({"rope_theta": 10000.0})["rotary_dim"] == 20
    assert FAMILY.config_fields({"partial_rotary_factor": 0.5})["rotary_dim"] == 40


@pytest.mark.parametrize("attribute", ["use_parallel_residual", "qk_layernorm"])
def test_what_only_the_largest_has_is_refused(attribute):
    with pytest.raises(ConfigError, match=f"this StableLM has {attribute}"):
        FAMILY.config_fields({attribute: True})
