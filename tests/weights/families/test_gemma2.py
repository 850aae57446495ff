"""Gemma 2."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.gemma2 import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.test_gemma import GemmaTests
from tests.weights.families.tiny import LLAMA, random_model

# Caps that bite at the scores and logits of a tiny model.
GEMMA2 = {
    **LLAMA, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
}  # fmt: skip


class TestGemma2(GemmaTests):
    family = FAMILY
    cases = {
        "grouped": GEMMA2,
        "full": {**GEMMA2, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "single": {
            **GEMMA2, "num_key_value_heads": 1, "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "uncapped": {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    }  # fmt: skip


def test_published_configs():
    """Gemma 2 27B: its queries are scaled by d_model / n_heads, not by the head size."""
    fields = FAMILY.config_fields(
        {"hidden_size": 4608, "num_attention_heads": 32, "num_key_value_heads": 16,
         "head_dim": 128, "num_hidden_layers": 46, "query_pre_attn_scalar": 144,
         "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
         "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    )  # fmt: skip
    assert (fields["attn_scale"], fields["window_size"], fields["d_head"]) == (12.0, 4096, 128)
    assert fields["attn_types"] == ["local", "global"] * 23
    assert (fields["attn_scores_soft_cap"], fields["output_logits_soft_cap"]) == (50.0, 30.0)


def test_windows_with_scaled_positions_are_refused():
    with pytest.raises(ConfigError, match="linear rotary scaling"):
        FAMILY.config_fields({"rope_scaling": {"type": "linear", "factor": 2.0}})


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "gemma-2-") == 12


@pytest.mark.tl
@pytest.mark.parametrize("case", ["grouped", "full"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    check_same_as_transformerlens(random_model(TestGemma2, case), convert_gemma_weights)
