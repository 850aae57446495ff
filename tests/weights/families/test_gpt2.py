"""GPT-2: names, shapes and values against transformers and TransformerLens."""

import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.weights.families.gpt2 import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import cases_of, hf_model, save_folder, weights_of, write_gguf
from tests.weights.families.facts import (
    check_aliases,
    check_same_as_transformerlens,
)
from tests.weights.families.generated import FamilyTests


class TestGpt2(FamilyTests):
    family = FAMILY
    cases = cases_of(FAMILY.name)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "gpt2") > 40


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    check_same_as_transformerlens("gpt2", convert_gpt2_weights)


def test_config_fields():
    fields = open_source("x", hf_model=hf_model("gpt2_scaled")).config_fields()
    wanted = {
        "d_model": 32, "d_head": 8, "n_heads": 4, "n_layers": 3, "n_ctx": 32, "d_mlp": 40,
        "d_vocab": 60, "act_fn": "gelu_new", "eps": 1e-5, "normalization_type": "LN",
        "positional_embedding_type": "standard", "scale_attn_by_inverse_layer_idx": True,
        "use_attn_scale": True, "original_architecture": "GPT2LMHeadModel",
        "default_prepend_bos": True, "model_name": "x", "tokenizer_name": None,
    }  # fmt: skip
    assert fields == wanted
    assert HookedTransformerConfig(**{**fields, "d_mlp": None}).d_mlp == 128


def test_old_checkpoints_have_no_prefix_and_carry_masks(tmp_path):
    model = hf_model("gpt2")
    folder = save_folder(tmp_path, "gpt2", n_ctx=32, gradient_checkpointing=False)
    state = {k.removeprefix("transformer."): v for k, v in model.state_dict().items()}
    for layer in range(3):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32)
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    del state["lm_head.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    old, new = weights_of(open_source(folder)), weights_of(open_source("x", hf_model=model))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in new)


def test_gguf(tmp_path):
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "tiny.gguf", "gpt2")
    ours, theirs = open_source(path), open_source("x", hf_model=hf_model("gpt2"))
    want = weights_of(theirs)
    for key, tensor in weights_of(ours).items():
        assert torch.equal(tensor, want.pop(key)), key
    assert not want
    skip = ("model_name", "tokenizer_name")
    fields = {k: v for k, v in ours.config_fields().items() if k not in skip}
    assert fields.pop("eps") == pytest.approx(1e-5)
    assert fields.pop("d_mlp") == 128
    assert fields.items() <= theirs.config_fields().items()


def test_stanford_checkpoints():
    assert FAMILY.checkpoints is not None
    pattern, steps = FAMILY.checkpoints("stanford-crfm/alias-gpt2-small-x21")
    assert pattern.format(steps[-1]) == "checkpoint-400000" and len(steps) == 609
    assert FAMILY.checkpoints("gpt2") is None
