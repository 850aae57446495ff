"""GPT-OSS."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.gpt_oss import FAMILY
from fastlens.weights.source import open_source
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.mixtures import MIXTURE, MixtureTests
from tests.weights.families.tiny import YARN, random_model

GPT_OSS = {**MIXTURE, "num_local_experts": 5, "head_dim": 12, "sliding_window": 4,
           "rope_parameters": {**YARN, "truncate": False}}  # fmt: skip


class TestGptOss(MixtureTests):
    family = FAMILY
    cases = {
        "grouped": GPT_OSS,
        "full": {**GPT_OSS, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "single": {**GPT_OSS, "num_key_value_heads": 1, "attention_bias": False},
        # So low that it is reached.
        "clamped": {**GPT_OSS, "swiglu_limit": 0.3, "swiglu_alpha": 1.3,
                    "layer_types": ["full_attention", "sliding_attention"]},
    }  # fmt: skip


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["GptOssForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (8, 131072, 64)
    assert (fields["window_size"], fields["attn_types"][:3]) == (128, ["local", "global", "local"])
    assert (fields["rotary_base"], fields["yarn_factor"], fields["yarn_truncate"]) == (
        150000.0, 32.0, False,
    )  # fmt: skip
    assert (fields["num_experts"], fields["experts_per_token"]) == (128, 4)


def test_openais_own_config_is_read():
    """As on the hub, but for the quantisation."""
    fields = FAMILY.config_fields(
        {"architectures": ["GptOssForCausalLM"], "experts_per_token": 4,
         "initial_context_length": 4096, "num_hidden_layers": 24, "num_local_experts": 32,
         "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                          "original_max_position_embeddings": 4096, "rope_type": "yarn",
                          "truncate": False},
         "rope_theta": 150000, "swiglu_limit": 7.0}
    )  # fmt: skip
    assert (fields["rotary_base"], fields["expert_glu_limit"]) == (150000, 7.0)


def test_packed_weights_are_refused():
    theirs = random_model(TestGptOss, "grouped")
    theirs.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(ConfigError, match=r"quantised \(mxfp4\).*hf_model="):
        open_source("x", hf_model=theirs)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "gpt-oss") >= 2


@pytest.mark.tl
@pytest.mark.parametrize("case", ["grouped", "full"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions import convert_gpt_oss_weights

    check_same_as_transformerlens(random_model(TestGptOss, case), convert_gpt_oss_weights)
