"""A real model against what it is known to say, and against Hugging Face on the same weights."""

import pytest
import torch

from benchmarks.peers.smollm2 import hugging_face_twin
from fastlens import HookedTransformer
from tests.smollm2 import smollm2

EIFFEL = "The Eiffel Tower is in the city of"
IOI = "When John and Mary went to the store, Mary gave a bottle to"


@pytest.fixture(scope="module")
def model():
    """Unprocessed: the checkpoint's own logits."""
    smollm2()  # skips where the package is not installed
    return HookedTransformer.from_pretrained_no_processing("smollm2-135m", verbose=False)


def last_logits(model, text):
    with torch.no_grad():
        return model(text, prepend_bos=False)[0, -1]


def test_the_known_answers(model):
    paris, john, mary = (model.to_single_token(t) for t in (" Paris", " John", " Mary"))
    logits = last_logits(model, EIFFEL)
    assert logits.argmax() == paris
    assert logits[paris].item() == pytest.approx(13.69, abs=0.01)
    logits = last_logits(model, IOI)
    assert logits.argmax() == john
    assert (logits[john] - logits[mary]).item() == pytest.approx(5.88, abs=0.01)
    processed = last_logits(smollm2(), IOI)
    assert (processed[john] - processed[mary]).item() == pytest.approx(5.88, abs=0.01)


def test_random_tokens_are_foretold_the_second_time(model):
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(1000, 40000, (4, 50), generator=generator)
    with torch.no_grad():
        loss = model(torch.cat([once, once], 1), return_type="loss", loss_per_token=True)
    assert loss[:, :49].mean() > 13 and loss[:, 50:].mean() < 3


def test_logits_equal_hugging_face_on_the_same_weights(model):
    theirs = hugging_face_twin(model)
    with torch.no_grad():
        for text in (EIFFEL, IOI):
            tokens = model.to_tokens(text, prepend_bos=False)
            want, got = theirs(tokens).logits, model(tokens)
            assert (got - want).abs().max() <= 2e-4 * (want.max() - want.min())
