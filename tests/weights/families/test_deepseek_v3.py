"""DeepSeek-V3: its table against transformers."""

import math

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.deepseek_v3 import FAMILY
from tests.weights.families import grouped_mixtures
from tests.weights.families.generated import FamilyTests
from tests.weights.families.grouped_mixtures import GroupedMixtureTests

ATTENTION = {"num_key_value_heads": 4, "q_lora_rank": 14, "kv_lora_rank": 10,
             "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8}  # fmt: skip
MIXED = {**grouped_mixtures.MIXED, **ATTENTION}
_OF_MIXTURES = ("moe_intermediate_size", "n_group", "topk_group", "n_routed_experts",
                "num_experts_per_tok")  # fmt: skip
DENSE = {name: value for name, value in MIXED.items() if name not in _OF_MIXTURES}
DENSE["first_k_dense_replace"] = 3
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0,
        "mscale_all_dim": 0.7, "original_max_position_embeddings": 16, "beta_fast": 32,
        "beta_slow": 1}  # fmt: skip


class TestDense(FamilyTests):
    family = FAMILY
    cases = {
        "dense": DENSE,
        "no_q_latent": {**DENSE, "q_lora_rank": None, "rope_interleave": False},
        "yarn_biases": {**DENSE, "rope_parameters": YARN, "attention_bias": True},
    }


class TestMixtures(GroupedMixtureTests):
    family = FAMILY
    cases = {
        "groups": MIXED,
        "one_group": {**MIXED, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
                      "num_hidden_layers": 2, "first_k_dense_replace": 0},
    }  # fmt: skip


def test_the_softmax_has_yarns_factor():
    config = {**DENSE, "rope_scaling": {**YARN, "type": "yarn"}}
    fields = FAMILY.config_fields(config)
    growth = 0.1 * 0.7 * math.log(4) + 1
    assert fields["attn_scale"] == pytest.approx(math.sqrt(10) / growth**2)
    assert fields["yarn_attention_factor"] == pytest.approx((0.1 * math.log(4) + 1) / growth)


def test_the_published_sizes():
    fields = FAMILY.config_fields({"architectures": ["DeepseekV3ForCausalLM"]})
    assert (fields["d_head"], fields["d_value"], fields["n_heads"]) == (192, 128, 128)
    assert (fields["num_experts"], fields["experts_per_token"]) == (256, 8)
    assert (fields["d_mlp"], fields["d_mlp_dense"], fields["d_shared_expert"]) == (
        2048,
        18432,
        2048,
    )
    assert (fields["n_dense_layers"], fields["expert_groups"]) == (3, 8)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="num_key_value_heads=2 was asked beside 4 heads"):
        FAMILY.config_fields({**DENSE, "num_key_value_heads": 2})
    with pytest.raises(ConfigError, match="scoring_func='softmax'"):
        FAMILY.config_fields({**MIXED, "scoring_func": "softmax"})
    with pytest.raises(ConfigError, match=r"stored quantised \(fp8\)"):
        FAMILY.config_fields({**MIXED, "quantization_config": {"quant_method": "fp8"}})
