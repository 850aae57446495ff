"""GPT-NeoX: names, shapes and values against transformers and TransformerLens."""

import pytest
import torch

from fastlens.weights.families.gpt_neox import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import cases_of, hf_model, save_folder, weights_of, write_gguf
from tests.weights.families.facts import (
    check_aliases,
    check_same_as_transformerlens,
)
from tests.weights.families.generated import FamilyTests


class TestGptNeoX(FamilyTests):
    family = FAMILY
    cases = cases_of(FAMILY.name)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "pythia", "neox", "stablelm") > 100


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights

    check_same_as_transformerlens("neox", convert_neox_weights)


def test_config_fields():
    fields = open_source("x", hf_model=hf_model("neox_sequential")).config_fields()
    assert fields["parallel_attn_mlp"] is False and fields["default_prepend_bos"] is False
    assert (fields["rotary_dim"], fields["rotary_base"]) == (4, 500.0)
    assert open_source("x", hf_model=hf_model("neox")).config_fields()["parallel_attn_mlp"] is True


def test_pythias_old_config_keys(tmp_path):
    """``rotary_pct`` and ``rotary_emb_base`` as in the published config.json files."""
    folder = save_folder(
        tmp_path, "neox_sequential", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=500
    )
    old = open_source(folder).config_fields()
    new = open_source("x", hf_model=hf_model("neox_sequential")).config_fields()
    assert old == {**new, "model_name": old["model_name"], "rotary_base": 500}


def test_the_old_name_of_the_unembedding(tmp_path):
    model = hf_model("neox")
    folder = save_folder(tmp_path, "neox")
    state = {k.replace("lm_head", "embed_out"): v for k, v in model.state_dict().items()}
    assert "embed_out.weight" in state
    for layer in range(3):
        prefix = f"gpt_neox.layers.{layer}.attention."
        state |= {prefix + "bias": torch.ones(1), prefix + "masked_bias": torch.tensor(-1e9)}
        state[prefix + "rotary_emb.inv_freq"] = torch.ones(1)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    old, new = weights_of(open_source(folder)), weights_of(open_source("x", hf_model=model))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in new)


@pytest.mark.parametrize("case", ["neox", "neox_sequential"])
def test_gguf(case, tmp_path):
    pytest.importorskip("gguf")
    metadata = {"rope.freq_base": 500.0} if case == "neox_sequential" else {}
    ours = open_source(write_gguf(tmp_path / "tiny.gguf", case, **metadata))
    theirs = open_source("x", hf_model=hf_model(case))
    want = weights_of(theirs)
    for key, tensor in weights_of(ours).items():
        assert torch.equal(tensor, want.pop(key)), key
    assert not want
    skip = ("model_name", "tokenizer_name", "eps")
    fields = {k: v for k, v in ours.config_fields().items() if k not in skip}
    assert fields.items() <= theirs.config_fields().items()


def test_pythia_checkpoints():
    assert FAMILY.checkpoints is not None
    pattern, steps = FAMILY.checkpoints("EleutherAI/pythia-70m")
    assert pattern.format(steps[0]) == "step0" and len(steps) == 154
    assert steps[:12] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    assert len(FAMILY.checkpoints("EleutherAI/pythia-70m-v0")[1]) == 143
    assert FAMILY.checkpoints("EleutherAI/gpt-neox-20b") is None
