"""EXAONE 4."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.exaone4 import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, LLAMA3

EXAONE4 = {**LLAMA, "sliding_window": 4, "num_hidden_layers": 4}


class TestExaone4(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": {**EXAONE4, "rope_parameters": LLAMA3},
        "full": {**EXAONE4, "num_key_value_heads": 4, "tie_word_embeddings": True,
                 "num_hidden_layers": 2, "sliding_window_pattern": 2},
        # Without windows all layers rotate.
        "single": {**EXAONE4, "num_key_value_heads": 1, "sliding_window": None,
                   "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    }  # fmt: skip


def test_published_configs():
    """EXAONE 4.0 32B: its pattern is a word beside layer_types. The 1.2B has no windows."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    fields = FAMILY.config_fields(
        {"num_hidden_layers": 64, "layer_types": kinds * 16, "sliding_window": 4096,
         "sliding_window_pattern": "LLLG", "head_dim": 128, "num_attention_heads": 40,
         "num_key_value_heads": 8, "hidden_size": 5120, "rope_theta": 1000000,
         "rope_scaling": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
    )  # fmt: skip
    assert fields["rotary_layers"] == [True, True, True, False] * 16
    assert fields["attn_types"] == ["local", "local", "local", "global"] * 16
    assert (fields["NTK_by_parts_factor"], fields["d_head"]) == (16.0, 128)
    small = FAMILY.config_fields({"sliding_window": None, "sliding_window_pattern": None})
    assert "rotary_layers" not in small and "use_local_attn" not in small


def test_a_pattern_in_words_needs_layer_types():
    with pytest.raises(ConfigError, match="sliding_window_pattern='LLLG' .* Set layer_types"):
        FAMILY.config_fields({"sliding_window_pattern": "LLLG"})
