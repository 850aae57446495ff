"""Next-sentence prediction against transformers (float64) and TransformerLens 3.9."""

import inspect
import warnings

import pytest
import torch

from fastlens.errors import TokenError, WeightsError
from fastlens.model.bert_next_sentence_prediction import BertNextSentencePrediction
from fastlens.model.hooked_encoder import HookedEncoder
from tests.close import assert_close_to
from tests.encoders import bert_tokenizer, hf_bert, hf_inputs, inputs, ours, pair

COMPARED = [
    f"transformer_lens.BertNextSentencePrediction.BertNextSentencePrediction.{name}"
    for name in ("forward", "to_tokens", "run_with_cache")
] + [
    "transformer_lens.components.bert_pooler.BertPooler.forward",
    "transformer_lens.components.bert_nsp_head.BertNSPHead.forward",
]
TEXTS = ["the cat sat", "a dog ran"]


def both(**options):
    """TransformerLens' and ours, weights equal."""
    from transformer_lens import BertNextSentencePrediction as Theirs

    theirs, model = pair(bert_tokenizer(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Theirs(theirs), BertNextSentencePrediction(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForNextSentencePrediction"])
def test_logits_are_transformers(name):
    reference = hf_bert(name, dtype="float64")
    model = HookedEncoder.from_pretrained(
        "tiny", hf_model=reference, dtype="float64", verbose=False
    )
    want = reference(**hf_inputs())
    want = want.seq_relationship_logits if "PreTraining" in name else want.logits
    assert want.std() > 0.05
    assert_close_to(BertNextSentencePrediction(model)(**inputs()), want)


@pytest.mark.tl
def test_every_hook_is_transformerlens():
    theirs, model = both()
    want, want_cache = theirs.run_with_cache(**inputs())
    got, got_cache = model.run_with_cache(**inputs())
    assert_close_to(got, want)
    assert list(got_cache.keys()) == list(want_cache.keys())
    for key, activation in want_cache.items():
        assert_close_to(got_cache[key], activation, name=key)
    assert got_cache.model is model and want_cache.model is theirs
    plain = model.run_with_cache(TEXTS, return_cache_object=False, remove_batch_dim=True)[1]
    assert type(plain) is dict and plain["hook_full_embed"].ndim == 2


@pytest.mark.tl
def test_pairs_of_texts():
    theirs, model = both()
    for texts in (TEXTS, ["the cats " * 30, "a dog"]):
        want, got = theirs.to_tokens(texts), model.to_tokens(texts)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[1].sum() > 0
    for return_type in ("logits", "predictions", None):
        want, got = theirs(TEXTS, return_type=return_type), model(TEXTS, return_type=return_type)
        assert_close_to(got, want) if return_type == "logits" else None
        assert return_type == "logits" or got == want
    types = torch.zeros_like(model.to_tokens(TEXTS)[0])
    want = theirs.forward(TEXTS, token_type_ids=types)
    assert_close_to(model.forward(TEXTS, token_type_ids=types), want)
    assert not torch.allclose(model(TEXTS), want)


def test_predictions_of_a_batch():
    model = BertNextSentencePrediction(ours())
    said = model(**inputs(), return_type="predictions")
    wanted = ["The sentences are sequential", "The sentences are NOT sequential"]
    assert said == [wanted[i] for i in model(**inputs()).argmax(-1).tolist()]


def test_a_pair_does_not_see_its_padding():
    model, given = BertNextSentencePrediction(ours()), inputs()
    batched = model(**given)
    for row, length in enumerate(given["one_zero_attention_mask"].sum(1).tolist()):
        alone = model(
            given["input"][row : row + 1, :length],
            token_type_ids=given["token_type_ids"][row : row + 1, :length],
        )
        assert_close_to(batched[row : row + 1], alone)


def test_hooks_run_this_forward_and_leave_the_encoder_as_it_was():
    encoder = ours()
    model = BertNextSentencePrediction(encoder)
    zero = [("pooler.hook_pooler_out", lambda pooled, hook: pooled * 0)]
    found = model.run_with_hooks(**inputs(), fwd_hooks=zero)
    assert_close_to(found, encoder.nsp_head.b.detach().expand(3, 2))

    def stop(pooled, hook):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        model.run_with_hooks(**inputs(), fwd_hooks=[("pooler.hook_pooler_out", stop)])
    assert "forward" not in vars(encoder) and not encoder.list_hooks()
    assert encoder(**inputs()).shape == (3, 11, 40)


def test_mistakes_are_told():
    model = BertNextSentencePrediction(ours(bert_tokenizer()))
    with pytest.raises(ValueError, match="without token_type_ids"):
        model(inputs()["input"])
    for texts in (["the cat"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="takes two texts"):
            model(texts)
    with pytest.raises(ValueError, match="takes two texts"):
        inspect.unwrap(type(model).to_tokens)(model, [["a", "cat"], ["the", "dog"]])
    with pytest.raises(ValueError, match="'predictions' or None"):
        model(TEXTS, return_type="prediction")
    with pytest.raises(TokenError, match="needs a tokenizer"):
        BertNextSentencePrediction(ours())(TEXTS)
    masked_only = HookedEncoder.from_pretrained(
        "tiny", hf_model=hf_bert("BertForMaskedLM"), verbose=False
    )
    with pytest.raises(WeightsError, match="no weights for pooler, nsp_head"):
        BertNextSentencePrediction(masked_only)(**inputs())
