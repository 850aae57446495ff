"""BioGPT: OPT's tensors with scaled embeddings, against transformers."""

import torch

from fastlens.weights.families.biogpt import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import weights_of
from tests.weights.families.generated import FamilyTests

TINY = {
    "vocab_size": 60, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
SHORT = {**TINY, "num_hidden_layers": 2}


class TestBioGpt(FamilyTests):
    family = FAMILY
    cases = {
        "plain": TINY,
        "unscaled": {**SHORT, "scale_embedding": False, "hidden_act": "relu"},
        "untied": {**SHORT, "tie_word_embeddings": False},
    }


def test_the_embedding_is_scaled_and_the_tied_unembedding_is_not():
    model = TestBioGpt.transformers_model("plain")
    weights = weights_of(open_source("x", hf_model=model))
    stored = model.biogpt.embed_tokens.weight
    assert torch.allclose(weights["embed.W_E"], stored * 32**0.5)
    assert torch.equal(weights["unembed.W_U"], stored.T)
