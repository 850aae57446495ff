"""data2vec for text: against transformers."""

from fastlens.weights.families.data2vec_text import FAMILY
from tests.weights.families.generated_encoders import TINY, EncoderTests


class TestData2VecText(EncoderTests):
    family = FAMILY
    cases = {"released": {**TINY, "type_vocab_size": 1, "layer_norm_eps": 1e-5}}
