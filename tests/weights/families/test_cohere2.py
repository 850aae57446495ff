"""Cohere 2."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.cohere2 import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN

COHERE2 = {**LLAMA, "logit_scale": 0.5, "sliding_window": 4, "num_hidden_layers": 4}


class TestCohere2(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": COHERE2,
        "full": {**COHERE2, "num_key_value_heads": None, "tie_word_embeddings": False,
                 "rope_parameters": YARN},
        "single": {**COHERE2, "num_key_value_heads": 1, "attention_bias": True,
                   "num_hidden_layers": 2, "sliding_window_pattern": 2},
        # No layer knows positions.
        "global": {**COHERE2, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    }  # fmt: skip


def test_published_configs():
    """Command R7B."""
    fields = FAMILY.config_fields(
        {"hidden_size": 4096, "head_dim": 128, "num_attention_heads": 32, "num_hidden_layers": 32,
         "num_key_value_heads": 8, "rope_theta": 50000, "rotary_pct": 1, "sliding_window": 4096,
         "sliding_window_pattern": 4, "use_qk_norm": False, "use_parallel_block": True,
         "position_embedding_type": "rope_gptj", "cache_implementation": "hybrid",
         "order_of_interleaved_layers": "local_attn_first", "use_embedding_sharing": True}
    )  # fmt: skip
    assert fields["attn_types"] == ["local", "local", "local", "global"] * 8
    assert fields["rotary_layers"] == [True, True, True, False] * 8
    assert (fields["rotary_base"], fields["n_key_value_heads"]) == (50000, 8)


def test_what_is_not_computed_is_refused():
    with pytest.raises(ConfigError, match="does not account for .*use_qk_norm=True"):
        FAMILY.config_fields({"use_qk_norm": True})
