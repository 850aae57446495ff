"""Qwen 1.5 and 2 with mixtures of experts."""

from fastlens.weights.families.qwen2_moe import FAMILY
from tests.weights.families.mixtures import MIXTURE, MixtureTests

QWEN2_MOE = {**MIXTURE, "num_experts": 6, "moe_intermediate_size": 20,
             "shared_expert_intermediate_size": 28}  # fmt: skip


class TestQwen2Moe(MixtureTests):
    family = FAMILY
    cases = {
        "full": {**QWEN2_MOE, "num_key_value_heads": 4},
        "grouped": {**QWEN2_MOE, "norm_topk_prob": True, "qkv_bias": False},
        "single": {**QWEN2_MOE, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "windows": {**QWEN2_MOE, "num_hidden_layers": 3, "use_sliding_window": True,
                    "sliding_window": 4, "max_window_layers": 2},
    }  # fmt: skip


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["Qwen2MoeForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (None, 32768, 128)
    assert (fields["num_experts"], fields["d_mlp"], fields["d_shared_expert"]) == (60, 1408, 5632)


def test_windows_stand_in_every_other_layer_below_the_last_windowed():
    fields = FAMILY.config_fields(
        {"use_sliding_window": True, "num_hidden_layers": 6, "max_window_layers": 4}
    )
    assert fields["attn_types"] == ["local", "global", "local", "global", "global", "global"]
