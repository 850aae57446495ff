"""Persimmon: its table against transformers."""

from fastlens.weights.families.persimmon import FAMILY
from tests.weights.families.generated import FamilyTests

TINY = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


class TestPersimmon(FamilyTests):
    family = FAMILY
    cases = {
        "normed": TINY,
        "plain": {**TINY, "qk_layernorm": False, "tie_word_embeddings": True,
                  "num_hidden_layers": 2},
    }  # fmt: skip


def test_half_of_each_head_is_rotated():
    fields = FAMILY.config_fields({"architectures": ["PersimmonForCausalLM"]})
    assert (fields["d_head"], fields["rotary_dim"], fields["n_ctx"]) == (64, 32, 16384)
    assert FAMILY.config_fields({"partial_rotary_factor": 0.25})["rotary_dim"] == 16
