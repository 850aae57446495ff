"""SmolLM 3."""

from fastlens.weights.families.smollm3 import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN


class TestSmolLM3(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": {**LLAMA, "no_rope_layers": [1, 0, 1]},
        "full": {**LLAMA, "num_key_value_heads": 4, "no_rope_layer_interval": 2,
                 "tie_word_embeddings": False},
        "single": {**LLAMA, "num_key_value_heads": 1, "rope_parameters": YARN,
                   "attention_bias": True},
        "windows": {**LLAMA, "no_rope_layers": [1, 0, 1], "use_sliding_window": True,
                    "sliding_window": 4},
    }  # fmt: skip


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["SmolLM3ForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (4, 32768, 128)
    assert fields["rotary_layers"] == [True, True, True, False] * 9
    assert fields["rotary_base"] == 2000000.0
