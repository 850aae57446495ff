"""Youtu-LLM: its table against transformers."""

from fastlens.weights.families.youtu import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.test_deepseek_v3 import DENSE as TINY

YOUTU = {name: value for name, value in TINY.items() if name != "first_k_dense_replace"}


class TestYoutu(FamilyTests):
    family = FAMILY
    cases = {
        "tied": YOUTU,
        "untied": {**YOUTU, "tie_word_embeddings": False, "attention_bias": True},
    }


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["YoutuForCausalLM"]})
    assert (fields["d_head"], fields["d_value"], fields["n_heads"]) == (192, 128, 16)
    assert (fields["d_q_latent"], fields["d_kv_latent"], fields["n_ctx"]) == (1536, 512, 131072)
