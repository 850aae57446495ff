"""Phi 3 and 4."""

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.weights.families.phi3 import FAMILY
from tests.close import assert_close_to
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests, tokens_of
from tests.weights.families.tiny import LLAMA, random_model

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip
HALF = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}


class TestPhi3(FamilyTests):
    family = FAMILY
    cases = {
        "grouped": LLAMA,
        "full": {**LLAMA, "num_key_value_heads": None, "tie_word_embeddings": True},
        "single": {**LLAMA, "num_key_value_heads": 1, "rope_parameters": HALF},
        "window": {**LLAMA, "sliding_window": 4},
        # Texts of the tests lie on both sides of the 8 tokens.
        "longrope": {**LLAMA, "original_max_position_embeddings": 8, "rope_parameters": LONGROPE},
    }


def test_published_configs():
    """Phi-3-mini-4k as it was published, and the share of rotated channels beside its table."""
    fields = FAMILY.config_fields(
        {"hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32,
         "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
         "original_max_position_embeddings": 4096, "attention_bias": False}
    )  # fmt: skip
    assert (fields["d_head"], fields["n_key_value_heads"], fields["window_size"]) == (
        96,
        None,
        2047,
    )
    assert (fields["rotary_dim"], fields["default_prepend_bos"]) == (96, True)
    assert FAMILY.config_fields({"partial_rotary_factor": 0.75})["rotary_dim"] == 72


@pytest.mark.parametrize("length", [7, 8, 9, 12])
def test_the_length_of_a_text_chooses_its_rotary_table(length):
    theirs = random_model(TestPhi3, "longrope")
    model = HookedTransformer.from_pretrained_no_processing("x", hf_model=theirs, verbose=False)
    tokens = tokens_of(2, length)
    with torch.no_grad():
        assert_close_to(model(tokens), theirs(tokens).logits, atol=1e-5, name="logits")


@pytest.mark.parametrize("old", ["su", "yarn", "longrope"])
def test_old_names_of_longrope(old):
    scaling = {"type": old, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    fields = FAMILY.config_fields({"rope_scaling": scaling, "max_position_embeddings": 131072})
    assert fields["longrope_original_ctx_len"] == 4096
    assert fields["longrope_attention_factor"] == pytest.approx(1.1902, abs=1e-4)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "phi-3", "phi-4") == 4


@pytest.mark.tl
@pytest.mark.parametrize("case", ["grouped", "full", "single"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions import convert_phi3_weights

    check_same_as_transformerlens(random_model(TestPhi3, case), convert_phi3_weights)
