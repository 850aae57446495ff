"""DeepSeek-V3: its table against transformers."""

import math

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.deepseek_v3 import FAMILY
from tests.weights.families.generated import FamilyTests

TINY = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
        "q_lora_rank": 14, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
        "v_head_dim": 8, "first_k_dense_replace": 3, "rms_norm_eps": 1e-5}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0,
        "mscale_all_dim": 0.7, "original_max_position_embeddings": 16, "beta_fast": 32,
        "beta_slow": 1}  # fmt: skip


class TestDeepseekV3(FamilyTests):
    family = FAMILY
    cases = {
        "dense": TINY,
        "no_q_latent": {**TINY, "q_lora_rank": None, "rope_interleave": False},
        "yarn_biases": {**TINY, "rope_parameters": YARN, "attention_bias": True},
    }


def test_the_softmax_has_yarns_factor():
    config = {**TINY, "rope_scaling": {**YARN, "type": "yarn"}}
    fields = FAMILY.config_fields(config)
    growth = 0.1 * 0.7 * math.log(4) + 1
    assert fields["attn_scale"] == pytest.approx(math.sqrt(10) / growth**2)
    assert fields["yarn_attention_factor"] == pytest.approx((0.1 * math.log(4) + 1) / growth)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="layers 1 to 2 of this DeepSeek are mixtures"):
        FAMILY.config_fields({**TINY, "first_k_dense_replace": 1})
    with pytest.raises(ConfigError, match="num_key_value_heads=2 was asked beside 4 heads"):
        FAMILY.config_fields({**TINY, "num_key_value_heads": 2})
