"""GPT-Neo: windows in some layers, unscaled scores, against transformers and TransformerLens."""

from typing import Any

import pytest
import torch

from fastlens.errors import ConfigError
from fastlens.weights.families.gpt_neo import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import edit_config, weights_of
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests

TINY = {
    "vocab_size": 60, "max_position_embeddings": 64, "hidden_size": 32, "num_layers": 3,
    "num_heads": 4, "window_size": 4, "attention_types": [[["global", "local"], 1], [["local"], 1]],
}  # fmt: skip


class TestGptNeo(FamilyTests):
    family = FAMILY
    cases = {
        "windows": TINY,
        "global": {**TINY, "num_layers": 2, "attention_types": [[["global"], 2]],
                   "intermediate_size": 40, "activation_function": "gelu"},
        "untied": {**TINY, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
                   "tie_word_embeddings": False},
    }  # fmt: skip


def _tiny() -> Any:
    return TestGptNeo.transformers_model("windows")


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "neo", "tiny-stories") > 25


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions import convert_neo_weights

    check_same_as_transformerlens(_tiny(), convert_neo_weights)


def test_config_fields():
    fields = open_source("x", hf_model=_tiny()).config_fields()
    assert fields["attn_types"] == ["global", "local", "local"]
    assert (fields["window_size"], fields["use_local_attn"]) == (4, True)
    assert (fields["use_attn_scale"], fields["d_mlp"], fields["d_head"]) == (False, None, 8)


@pytest.mark.parametrize(
    "changes",
    [{"attention_layers": ["global", "local", "global"]}, {"num_layers": 2}],
)
def test_kinds_of_layers_that_disagree_are_refused(changes, tmp_path):
    _tiny().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match="attention_types=.* gives 3 layers"):
        open_source(tmp_path).config_fields()


def test_old_checkpoints_carry_masks(tmp_path):
    model = _tiny()
    model.save_pretrained(tmp_path)
    state = dict(model.state_dict())
    for layer in range(3):
        prefix = f"transformer.h.{layer}.attn.attention."
        state |= {prefix + "bias": torch.ones(1, 1, 64, 64), prefix + "masked_bias": torch.ones(())}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    old, new = weights_of(open_source(tmp_path)), weights_of(open_source("x", hf_model=model))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in new)
