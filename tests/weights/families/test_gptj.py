"""GPT-J: adjacent rotary pairs and a shared norm, against transformers and TransformerLens."""

from typing import Any

import pytest
import torch

from fastlens.errors import ConfigError
from fastlens.weights.families.gptj import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import edit_config, weights_of
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests

TINY = {
    "vocab_size": 60, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4,
}  # fmt: skip


class TestGptJ(FamilyTests):
    family = FAMILY
    cases = {
        "plain": TINY,
        "full_rotary": {**TINY, "n_layer": 2, "rotary_dim": 8, "n_inner": 40},
        "tied": {**TINY, "n_layer": 2, "tie_word_embeddings": True, "activation_function": "gelu"},
    }


def _tiny() -> Any:
    model = TestGptJ.transformers_model("plain")
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "j") == 4


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions import convert_gptj_weights

    check_same_as_transformerlens(_tiny(), convert_gptj_weights)


def test_the_published_config_and_its_masks(tmp_path):
    model = _tiny()
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, rotary=True, scale_attn_weights=True, summary_type="cls_index")
    state = dict(model.state_dict())
    for layer in range(3):
        prefix = f"transformer.h.{layer}.attn."
        state |= {prefix + "bias": torch.ones(1, 1, 64, 64), prefix + "masked_bias": torch.ones(())}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    old, new = open_source(tmp_path), open_source("x", hf_model=model)
    assert weights_of(old).keys() == weights_of(new).keys()
    assert all(torch.equal(tensor, weights_of(new)[key]) for key, tensor in weights_of(old).items())
    fields = old.config_fields()
    assert (fields["rotary_dim"], fields["rotary_adjacent_pairs"]) == (4, True)
    edit_config(tmp_path, rotary=False)
    with pytest.raises(ConfigError, match="rotary=False"):
        open_source(tmp_path)


@pytest.mark.parametrize("rotary_dim", [0, 16])
def test_rotary_sizes_that_do_not_fit_are_refused(rotary_dim, tmp_path):
    _tiny().save_pretrained(tmp_path)
    edit_config(tmp_path, rotary_dim=rotary_dim)
    with pytest.raises(ConfigError, match=f"rotary_dim={rotary_dim} was found"):
        open_source(tmp_path)
