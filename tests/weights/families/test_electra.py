"""ELECTRA: generators and discriminators against transformers."""

import pytest
import torch

from fastlens.errors import WeightsError
from fastlens.weights.families.electra import FAMILY
from tests.close import assert_close_to
from tests.weights.families.generated_encoders import TINY, EncoderTests, loaded, small


class TestElectra(EncoderTests):
    family = FAMILY
    moves_with_padding = True
    cases = {
        "narrow embeddings": {**TINY, "embedding_size": 16},
        "wide embeddings, other activation": {
            **TINY, "embedding_size": 32, "hidden_act": "relu", "tie_word_embeddings": False,
        },
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", TestElectra.cases)
def test_discriminators(case):
    theirs = small(TestElectra, case, "ElectraForPreTraining")
    model = loaded(theirs)
    assert model.absent_parts == {"mlm_head", "unembed"}
    given = TestElectra().given(case, "right")
    want = theirs(given["input"], attention_mask=given["one_zero_attention_mask"]).logits
    got, cache = model.run_with_cache(**given, return_type="replaced")
    assert_close_to(got, want, name="replaced")
    assert_close_to(cache["rtd_head.hook_rtd_out"], want, name="hook")
    assert model(**given, return_type=None) is None
    with pytest.raises(WeightsError, match="no weights for mlm_head, unembed"):
        model(**given)


def test_generators_tell_no_replaced_tokens():
    model = loaded(small(TestElectra, "narrow embeddings"))
    with pytest.raises(WeightsError, match="no weights for rtd_head"):
        model(torch.full((1, 4), 7), return_type="replaced")


def test_widths():
    model = loaded(small(TestElectra, "narrow embeddings"))
    assert model.W_E.shape == (60, 16) and model.W_U.shape == (16, 60)
    assert model.embed.W_proj.shape == (16, 32) and model.W_E_pos.shape == (124, 16)
