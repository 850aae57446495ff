"""XLM-RoBERTa: against transformers."""

from fastlens.weights.families.xlm_roberta import FAMILY
from tests.weights.families.generated_encoders import TINY, EncoderTests


class TestXlmRoberta(EncoderTests):
    family = FAMILY
    cases = {"released": {**TINY, "type_vocab_size": 1, "layer_norm_eps": 1e-5}}
