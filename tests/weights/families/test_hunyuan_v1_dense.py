"""HunYuan: its table against transformers."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.hunyuan_v1_dense import FAMILY
from tests.weights.families.generated import FamilyTests

TINY = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
ALPHA = {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 10000.0, "factor": 1.0,
         "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


class TestHunYuan(FamilyTests):
    family = FAMILY
    cases = {
        "full": {**TINY, "attention_bias": True},
        "stretched": {**TINY, "num_key_value_heads": 2, "rope_parameters": ALPHA},
        "single": {**TINY, "num_key_value_heads": 1, "num_hidden_layers": 2,
                   "tie_word_embeddings": True},
    }  # fmt: skip


def test_a_fixed_alpha_stretches_the_base():
    fields = FAMILY.config_fields({**TINY, "rope_theta": 500.0, "rope_scaling":
                                   {"type": "dynamic", "alpha": 50.0, "factor": 1.0}})  # fmt: skip
    assert fields["rotary_base"] == pytest.approx(500.0 * 50.0 ** (8 / 6))
    with pytest.raises(ConfigError, match="rope_type='dynamic'"):
        FAMILY.config_fields({**TINY, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
