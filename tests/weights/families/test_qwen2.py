"""Qwen 1.5, 2 and 2.5."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.qwen2 import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN, random_model


class TestQwen2(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": LLAMA,
        "full": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "single": {**LLAMA, "num_key_value_heads": 1, "rope_parameters": YARN},
        "windows": {**LLAMA, "use_sliding_window": True, "sliding_window": 4,
                    "max_window_layers": 1},
        "layer_types": {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "layer_types":
                        ["sliding_attention", "full_attention", "sliding_attention"]},
    }  # fmt: skip


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["Qwen2ForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (32, 32768, 128)
    assert "use_local_attn" not in fields


def test_windows_as_saved_by_older_releases():
    """Qwen-2's configs hold the size of a window that is off."""
    off = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28}
    assert "use_local_attn" not in FAMILY.config_fields(off)
    on = FAMILY.config_fields({**off, "use_sliding_window": True})
    assert on["attn_types"] == ["global"] * 28 + ["local"] * 4
    with pytest.raises(ConfigError, match="gives the window no size"):
        FAMILY.config_fields({**off, "layer_types": ["sliding_attention"] * 32})


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "qwen1.5", "qwen2-", "qwen2.5", "preview") > 40


@pytest.mark.tl
@pytest.mark.parametrize("case", ["grouped", "full", "single"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions import convert_qwen2_weights

    check_same_as_transformerlens(random_model(TestQwen2, case), convert_qwen2_weights)
