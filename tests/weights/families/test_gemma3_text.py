"""Gemma 3 without images."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.gemma3_text import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.test_gemma import GemmaTests
from tests.weights.families.tiny import LLAMA, YARN, random_model

LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
GEMMA3 = {
    **LLAMA, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4,
    "sliding_window_pattern": 3, "rope_parameters": LINEAR,
}  # fmt: skip


class TestGemma3Text(GemmaTests):
    family = FAMILY
    cases = {
        "grouped": GEMMA3,
        "full": {**GEMMA3, "num_key_value_heads": 4, "tie_word_embeddings": False,
                 "rope_parameters": {**LINEAR, "full_attention": YARN}},
        "single": {**GEMMA3, "num_key_value_heads": 1, "attention_bias": True,
                   "rope_parameters": None, "final_logit_softcapping": 3.0,
                   "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        # No layer has a window.
        "global": {**GEMMA3, "sliding_window_pattern": 1},
    }  # fmt: skip


def test_published_configs():
    """Gemma 3 1B as it was published for an older transformers."""
    fields = FAMILY.config_fields(
        {"hidden_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
         "num_hidden_layers": 26, "sliding_window": 512, "sliding_window_pattern": 6,
         "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None,
         "query_pre_attn_scalar": 256, "attn_logit_softcapping": None,
         "final_logit_softcapping": None, "cache_implementation": "hybrid",
         "vocab_size": 262144, "max_position_embeddings": 32768}
    )  # fmt: skip
    assert (fields["rotary_base"], fields["rotary_base_local"]) == (1000000, 10000)
    assert (fields["window_size"], fields["n_ctx"], fields["attn_scale"]) == (512, 32768, 16.0)
    assert fields["attn_types"] == ([*["local"] * 5, "global"] * 5)[:26]
    assert "rotary_scaling_factor" not in fields


def test_old_and_new_rotary_parameters_agree():
    new = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
           "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}  # fmt: skip
    old = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5e5,
           "rope_local_base_freq": 2e4}  # fmt: skip
    fields = FAMILY.config_fields({"rope_parameters": new})
    assert fields == FAMILY.config_fields(old) and fields["rotary_scaling_factor"] == 8.0


def test_what_is_not_computed_is_refused():
    # transformers reads this attribute into Gemma 3's attention, and does not use it.
    with pytest.raises(ConfigError, match="does not account for .*attn_logit_softcapping"):
        FAMILY.config_fields({"attn_logit_softcapping": 50.0})


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "gemma-") == 10


@pytest.mark.tl
@pytest.mark.parametrize("case", ["grouped", "full"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    check_same_as_transformerlens(random_model(TestGemma3Text, case), convert_gemma_weights)
