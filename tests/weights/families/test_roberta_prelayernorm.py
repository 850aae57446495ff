"""RoBERTa with norms before its sublayers: against transformers."""

from fastlens.weights.families.roberta_prelayernorm import FAMILY
from tests.weights.families.generated_encoders import TINY, EncoderTests


class TestRobertaPreLayerNorm(EncoderTests):
    family = FAMILY
    cases = {
        "released": {**TINY, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        "relu, untied": {**TINY, "hidden_act": "relu", "tie_word_embeddings": False},
    }
