"""Megatron-BERT: against transformers."""

from fastlens.weights.families.megatron_bert import FAMILY
from tests.weights.families.generated_encoders import TINY, EncoderTests


class TestMegatronBert(EncoderTests):
    family = FAMILY
    moves_with_padding = True
    cases = {
        "plain": TINY,
        "relu, untied": {**TINY, "hidden_act": "relu", "tie_word_embeddings": False},
    }
