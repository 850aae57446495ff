"""DistilBERT: against transformers; no token types, no pooler."""

import pytest
import torch

from fastlens.errors import TokenError, WeightsError
from fastlens.model.bert_next_sentence_prediction import BertNextSentencePrediction
from fastlens.weights.families.distilbert import FAMILY
from tests.weights.families.generated_encoders import EncoderTests, loaded, small

TINY = {
    "vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48,
    "max_position_embeddings": 64,
}  # fmt: skip


class TestDistilBert(EncoderTests):
    family = FAMILY
    moves_with_padding = True
    cases = {
        "plain": TINY,
        "relu, untied, sinusoidal": {
            **TINY, "activation": "relu", "tie_word_embeddings": False,
            "sinusoidal_pos_embds": True,
        },
    }  # fmt: skip


def test_what_it_does_not_have():
    model = loaded(small(TestDistilBert, "plain"))
    tokens = torch.full((1, 4), 7)
    with pytest.raises(TokenError, match="one type of token"):
        model(tokens, token_type_ids=torch.ones_like(tokens))
    with pytest.raises(AttributeError, match="pooler: this kind of encoder has none"):
        model.pooler  # noqa: B018
    pair = BertNextSentencePrediction(model)
    with pytest.raises(WeightsError, match="of a kind that has no pooler, nsp_head. It has mlm"):
        pair(tokens, token_type_ids=torch.zeros_like(tokens))
    assert not any("token_type" in name for name in model.state_dict())
