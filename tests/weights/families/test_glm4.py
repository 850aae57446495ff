"""GLM-4-0414."""

from fastlens.weights.families.glm4 import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.test_glm import TestGlm


class TestGlm4(FamilyTests):
    family = FAMILY
    cases = TestGlm.cases


def test_norms_are_named_by_where_they_stand():
    """What GLM calls post_attention_layernorm stands before the MLP."""
    into = {name: key.into for name, key in FAMILY.keys.items() if key and "layernorm" in name}
    assert into == {
        "layers.{l}.input_layernorm.weight": "blocks.{l}.ln1.w",
        "layers.{l}.post_self_attn_layernorm.weight": "blocks.{l}.ln1_post.w",
        "layers.{l}.post_attention_layernorm.weight": "blocks.{l}.ln2.w",
        "layers.{l}.post_mlp_layernorm.weight": "blocks.{l}.ln2_post.w",
    }
