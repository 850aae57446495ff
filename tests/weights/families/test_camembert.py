"""CamemBERT: against transformers."""

from fastlens.weights.families.camembert import FAMILY
from tests.weights.families.generated_encoders import TINY, EncoderTests


class TestCamembert(EncoderTests):
    family = FAMILY
    cases = {"released": {**TINY, "type_vocab_size": 1, "layer_norm_eps": 1e-5}}
