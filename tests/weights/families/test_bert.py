"""BERT: names, shapes and values against transformers and TransformerLens."""

import copy

import pytest
import torch

from fastlens.config import EncoderConfig, HookedTransformerConfig
from fastlens.errors import ConfigError, WeightsError
from fastlens.weights.families.bert import FAMILY
from fastlens.weights.native import write_safetensors
from fastlens.weights.source import open_source
from tests.encoders import hf_bert
from tests.weights.checkpoints import edit_config, weights_of
from tests.weights.families.facts import check_aliases
from tests.weights.families.generated_encoders import TINY, EncoderTests

CLASSES = ["BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction", "BertModel"]


class TestBert(EncoderTests):
    family = FAMILY
    moves_with_padding = True
    cases = {
        "plain": TINY,
        "relu, untied, three token types": {
            **TINY, "hidden_act": "relu", "tie_word_embeddings": False, "type_vocab_size": 3,
        },
    }  # fmt: skip


def source_of(model):
    return open_source("x", hf_model=model)


def folder_of(folder, tensors, **changes):
    """A checkpoint folder with these tensors."""
    hf_bert().save_pretrained(folder)
    edit_config(folder, **changes)
    write_safetensors(folder / "model.safetensors", tensors)
    return open_source(folder)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "bert-base", "bert-large") >= 4


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions import convert_bert_weights

    source = source_of(hf_bert())
    cfg = HookedTransformerConfig(**source.config_fields(), device="cpu")
    theirs = convert_bert_weights(hf_bert(), cfg)
    found = weights_of(source)
    assert found.keys() == theirs.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, theirs[key]), key


def test_config_fields():
    wanted = {
        "d_model": 32, "d_head": 8, "n_heads": 4, "n_layers": 3, "n_ctx": 24, "d_mlp": 48,
        "d_vocab": 40, "act_fn": "gelu", "eps": 1e-12, "normalization_type": "LN",
        "positional_embedding_type": "standard", "attention_dir": "bidirectional",
        "original_architecture": "BertForPreTraining", "default_prepend_bos": True,
        "model_name": "x", "tokenizer_name": None, "encoder": EncoderConfig(),
    }  # fmt: skip
    assert source_of(hf_bert()).config_fields() == wanted
    relu = source_of(hf_bert(hidden_act="relu", layer_norm_eps=1e-5)).config_fields()
    assert relu["act_fn"] == "relu" and relu["eps"] == 1e-5


@pytest.mark.parametrize("name", CLASSES)
def test_classes_without_heads(name, tmp_path):
    model = hf_bert(name)
    want = weights_of(source_of(hf_bert()))
    parts = {key.split(".")[0] for key in weights_of(source_of(model))}
    assert (
        parts
        == {
            "BertForPreTraining": {key.split(".")[0] for key in want},
            "BertForMaskedLM": {"embed", "blocks", "mlm_head", "unembed"},
            "BertForNextSentencePrediction": {"embed", "blocks", "pooler", "nsp_head"},
            "BertModel": {"embed", "blocks", "pooler"},
        }[name]
    )
    # A file of BertModel has no prefix, and no decoder where it is tied.
    model.save_pretrained(tmp_path)
    of_folder = weights_of(open_source(tmp_path))
    of_memory = weights_of(source_of(model))
    assert of_folder.keys() == of_memory.keys()
    assert all(torch.equal(of_folder[key], of_memory[key]) for key in of_memory)


def test_half_a_head_is_refused(tmp_path):
    tensors = {k: v for k, v in hf_bert().state_dict().items() if "transform.LayerNorm" not in k}
    with pytest.raises(WeightsError, match=r"missing: cls\.predictions\.transform\.LayerNorm"):
        folder_of(tmp_path, tensors)


def test_names_from_tensorflow(tmp_path):
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in hf_bert().state_dict().items()
    }
    assert sum("gamma" in name for name in tensors) == 8
    tensors["bert.embeddings.position_ids"] = torch.arange(24).float()[None]
    found, want = weights_of(folder_of(tmp_path, tensors)), weights_of(source_of(hf_bert()))
    assert all(torch.equal(found[key], want[key]) for key in want)


@pytest.mark.parametrize("is_last", [True, False])
def test_an_untied_decoder_has_its_own_bias(is_last, tmp_path):
    model = copy.deepcopy(hf_bert(tie_word_embeddings=False))
    with torch.no_grad():
        model.cls.predictions.bias.fill_(7.0)
    tensors = dict(model.state_dict())
    own = tensors.pop("cls.predictions.decoder.bias")
    tensors = (
        {**tensors, "cls.predictions.decoder.bias": own}
        if is_last
        else {"cls.predictions.decoder.bias": own, **tensors}
    )
    source = folder_of(tmp_path, tensors, tie_word_embeddings=False)
    assert torch.equal(weights_of(source)["unembed.b_U"], own)
    assert not torch.equal(
        weights_of(source)["unembed.W_U"], weights_of(source)["embed.embed.W_E"].T
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_decoder": True}, "is a decoder"),
        ({"add_cross_attention": True}, "is a decoder"),
        ({"pruned_heads": {"1": [2]}}, "pruned_heads"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ],
)
def test_other_berts_are_refused(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        folder_of(tmp_path, hf_bert().state_dict(), **changes)
