"""MiniCPM3: its table against transformers."""

import math

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.minicpm3 import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.test_deepseek_v3 import DENSE as TINY

MINICPM3 = {name: value for name, value in TINY.items() if name != "first_k_dense_replace"}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 4.0], "original_max_position_embeddings": 8}  # fmt: skip


class TestMiniCPM3(FamilyTests):
    family = FAMILY
    cases = {
        "tied": {**MINICPM3, "dim_model_base": 16},
        "untied": {**MINICPM3, "tie_word_embeddings": False, "v_head_dim": None,
                   "attention_bias": True, "scale_depth": None, "dim_model_base": None},
    }  # fmt: skip


def test_longrope_needs_no_factor():
    fields = FAMILY.config_fields({**MINICPM3, "rope_scaling": LONG})
    assert fields["longrope_long_factor"] == [2.0, 4.0]
    assert fields["attn_scale"] == pytest.approx(math.sqrt(10))


def test_biases_of_the_mlp_are_refused():
    with pytest.raises(ConfigError, match="mlp_bias=True"):
        FAMILY.config_fields({**MINICPM3, "mlp_bias": True})
