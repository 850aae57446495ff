"""OPT: fairseq's names and position offset, against transformers and TransformerLens."""

from typing import Any

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import ConfigError
from fastlens.weights.families.opt import FAMILY
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.checkpoints import edit_config, weights_of
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests, tokens_of

TINY = {
    "vocab_size": 60, "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "ffn_dim": 40, "pad_token_id": 2,
}  # fmt: skip
SHORT = {**TINY, "num_hidden_layers": 2}


class TestOpt(FamilyTests):
    family = FAMILY
    cases = {
        "plain": TINY,
        "untied": {**SHORT, "tie_word_embeddings": False, "activation_function": "gelu"},
        "no_biases": {**SHORT, "enable_bias": False},
        "bare_norms": {**SHORT, "layer_norm_elementwise_affine": False},
    }


def _tiny() -> Any:
    return TestOpt.transformers_model("plain").eval()


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "opt") > 14


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions import convert_opt_weights

    check_same_as_transformerlens(_tiny(), convert_opt_weights)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_rows_are_transformers(side):
    theirs, tokens = _tiny(), tokens_of(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    ours = HookedTransformer.from_pretrained_no_processing("x", hf_model=theirs, verbose=False)
    with torch.no_grad():
        want, logits = theirs(tokens, attention_mask=mask).logits, ours(tokens, attention_mask=mask)
    assert_close_to(logits[mask == 1], want[mask == 1], atol=1e-5, name="logits")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 for hidden_size=32"),
        ({"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True was found"),
    ],
)
def test_what_is_not_computed_is_refused(changes, complaint, tmp_path):
    _tiny().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=complaint):
        open_source(tmp_path)


def test_old_checkpoints_are_of_the_base_model(tmp_path):
    model = _tiny()
    model.save_pretrained(tmp_path)
    state = {key.removeprefix("model."): v for key, v in model.state_dict().items()}
    state["decoder.version"] = torch.tensor([3.0])
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    old, new = weights_of(open_source(tmp_path)), weights_of(open_source("x", hf_model=model))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in new)
