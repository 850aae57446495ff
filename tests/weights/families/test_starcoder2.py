"""StarCoder 2."""

from fastlens.weights.families.starcoder2 import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN


class TestStarcoder2(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": LLAMA,
        "full": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "single": {**LLAMA, "num_key_value_heads": 1, "sliding_window": 4},
        "no_biases": {**LLAMA, "use_bias": False, "hidden_act": "gelu", "rope_parameters": YARN},
    }


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["Starcoder2ForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (2, 4096, 128)


def test_what_its_trainer_left_in_the_config():
    left = {"mlp_type": "default", "norm_type": "layer_norm", "layer_norm_epsilon": 1e-5,
            "attention_softmax_in_fp32": True, "sliding_window": 4096}  # fmt: skip
    assert FAMILY.config_fields(left)["attn_types"] == ["local"] * 30
