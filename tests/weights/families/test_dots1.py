"""dots.llm1: its table against transformers."""

from fastlens.weights.families.dots1 import FAMILY
from tests.weights.families.grouped_mixtures import MIXED, GroupedMixtureTests

DOTS = {**MIXED, "head_dim": 8, "n_shared_experts": 2}


class TestDots1(GroupedMixtureTests):
    family = FAMILY
    cases = {
        "full": {**DOTS, "num_key_value_heads": 4, "norm_topk_prob": True},
        "windows": {**DOTS, "num_key_value_heads": 2, "sliding_window": 4, "max_window_layers": 1,
                    "attention_bias": True, "num_hidden_layers": 2},
    }  # fmt: skip


def test_windows_begin_late():
    fields = FAMILY.config_fields({**DOTS, "sliding_window": 4, "max_window_layers": 1})
    assert fields["attn_types"] == ["global", "local", "local"]
    assert "attn_types" not in FAMILY.config_fields(DOTS)
