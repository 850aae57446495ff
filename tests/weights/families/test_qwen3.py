"""Qwen 3."""

import pytest

from fastlens.weights.families.qwen3 import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN, random_model

QWEN3 = {**LLAMA, "head_dim": 12}


class TestQwen3(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": QWEN3,
        "full": {**QWEN3, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "single": {**QWEN3, "num_key_value_heads": 1, "rope_parameters": YARN},
        "biased": {**QWEN3, "attention_bias": True},
        "windows": {**QWEN3, "use_sliding_window": True, "sliding_window": 4,
                    "max_window_layers": 1},
    }  # fmt: skip


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["Qwen3ForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (None, 32768, 128)
    assert (fields["use_qk_norm"], fields["default_prepend_bos"]) == (True, False)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "qwen3-0.6b", "qwen3-14b", "base") > 10


@pytest.mark.tl
@pytest.mark.parametrize("case", ["grouped", "full", "single"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions import convert_qwen3_weights

    check_same_as_transformerlens(random_model(TestQwen3, case), convert_qwen3_weights)
