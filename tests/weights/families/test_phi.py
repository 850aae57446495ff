"""Phi: a shared norm and partly rotated heads, against transformers and TransformerLens."""

from typing import Any

import pytest
import torch

from fastlens.errors import ConfigError
from fastlens.weights.families.phi import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import edit_config
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests

TINY = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
SHORT = {**TINY, "num_hidden_layers": 2}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0, "partial_rotary_factor": 0.25}


class TestPhi(FamilyTests):
    family = FAMILY
    cases = {
        "full": TINY,
        "grouped": {**SHORT, "num_key_value_heads": 2, "hidden_act": "gelu"},
        "single": {**SHORT, "num_key_value_heads": 1, "rope_parameters": _LINEAR},
        "tied": {**SHORT, "tie_word_embeddings": True},
    }


def _tiny() -> Any:
    model = TestPhi.transformers_model("full")
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "phi") == 6


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions import convert_phi_weights

    check_same_as_transformerlens(_tiny(), convert_phi_weights)


def test_the_published_config_keys(tmp_path):
    """``partial_rotary_factor`` beside ``rope_theta``, as in the released config.json files."""
    _tiny().save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=None, rope_theta=10000.0, partial_rotary_factor=0.25)
    fields = open_source(tmp_path).config_fields()
    assert (fields["rotary_dim"], fields["rotary_base"]) == (2, 10000.0)
    assert fields["default_prepend_bos"] is False
    edit_config(tmp_path, qk_layernorm=True)
    with pytest.raises(ConfigError, match="qk_layernorm=True"):
        open_source(tmp_path)
