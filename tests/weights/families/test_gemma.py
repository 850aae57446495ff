"""Gemma."""

import pytest
import torch
from torch import Tensor

from fastlens.errors import ConfigError
from fastlens.weights.families.gemma import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA, YARN, random_model

GEMMA = {**LLAMA, "head_dim": 12}


class GemmaTests(FamilyTests):
    """Gains are stored as their difference from one, so they are drawn around zero."""

    @classmethod
    def randomise(cls, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        super().randomise(name, parameter, generator)
        if name.endswith("norm.weight"):
            parameter.sub_(1.0)


class TestGemma(GemmaTests):
    family = FAMILY
    cases = {
        "single": {**GEMMA, "num_key_value_heads": 1},
        "full": {**GEMMA, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "grouped": {**GEMMA, "hidden_act": "gelu", "rope_parameters": YARN},
        "biased": {**GEMMA, "attention_bias": True},
    }


def test_published_configs():
    """Gemma 7B as it was first published: "gelu" is the tanh approximation."""
    fields = FAMILY.config_fields({"hidden_act": "gelu", "hidden_activation": None})
    assert (fields["act_fn"], fields["d_head"]) == ("gelu_pytorch_tanh", 256)
    # TransformerLens groups the heads of Gemma 7B, one in each group.
    assert (fields["n_key_value_heads"], fields["rotary_dim"]) == (16, 256)
    assert FAMILY.config_fields({"hidden_act": "silu"})["act_fn"] == "silu"


@pytest.mark.parametrize(
    "stated", [{"hidden_activation": "gelu"}, {"use_bidirectional_attention": True}]
)
def test_what_is_not_computed_is_refused(stated):
    with pytest.raises(ConfigError, match=f"does not account for .*{next(iter(stated))}"):
        FAMILY.config_fields(stated)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "gemma-") == 8


@pytest.mark.tl
@pytest.mark.parametrize("case", ["single", "full", "grouped"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    check_same_as_transformerlens(random_model(TestGemma, case), convert_gemma_weights)
