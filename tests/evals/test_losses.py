"""Losses against TransformerLens', and what padding does to them there."""

import warnings

import pytest
import torch

from fastlens.errors import TokenError
from fastlens.evals import evaluate, evaluate_on_dataset, induction_loss, losses, sanity_check
from fastlens.evals.losses import EvalError
from fastlens.model.hooked_transformer import HookedTransformer
from tests.close import assert_close_to
from tests.configs import tiny
from tests.models import ours
from tests.toy import ours_toy, theirs_of, toy_pair

COMPARED = [
    "transformer_lens.evals.evaluate",
    "transformer_lens.evals.evaluate_on_dataset",
    "transformer_lens.evals.induction_loss",
    "transformer_lens.evals.sanity_check",
]


@pytest.fixture(scope="module")
def tl_evals():
    pytest.importorskip("transformer_lens")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import evals
    return evals


def batches(n, d_vocab, rows=3):
    generator = torch.Generator().manual_seed(n)
    return [
        {"tokens": torch.randint(4, d_vocab, (rows, 15), generator=generator)} for _ in range(n)
    ]


# -- against TransformerLens ---------------------------------------------------------------------


@pytest.mark.tl
def test_a_sentence_as_transformer_lens(tl_evals):
    a, b = toy_pair()
    got, want = sanity_check(a), tl_evals.sanity_check(b)
    assert got.shape == () and 1 < got < 7
    assert_close_to(got, want)


@pytest.mark.tl
@pytest.mark.parametrize("truncate", [0, 2, 100])
def test_datasets_as_transformer_lens(tl_evals, truncate):
    a, b = toy_pair()
    data = batches(5, 100)
    got = evaluate_on_dataset(a, data, truncate)
    assert isinstance(got, float)
    assert got == pytest.approx(tl_evals.evaluate_on_dataset(b, data, truncate, device="cpu"), 1e-5)


@pytest.mark.tl
def test_all_datasets_as_transformer_lens(tl_evals, monkeypatch, capsys):
    a, b = toy_pair()
    seen = []

    def make(size):
        def loader(tokenizer, batch_size=8):
            seen.append((tokenizer is a.tokenizer or tokenizer is b.tokenizer, batch_size))
            return batches(size, 100, batch_size)

        return loader

    fakes = [make(size) for size in (2, 3, 4, 5)]
    monkeypatch.setattr(tl_evals, "DATASET_LOADERS", fakes)
    monkeypatch.setattr(losses, "DATASET_LOADERS", fakes)
    real = tl_evals.evaluate_on_dataset
    monkeypatch.setattr(
        tl_evals, "evaluate_on_dataset", lambda *a, **k: real(*a, **{**k, "device": "cpu"})
    )
    got, want = evaluate(a, 3, batch_size=2), tl_evals.evaluate(b, 3, batch_size=2)
    assert list(got) == list(want) == ["wiki_loss", "owt_loss", "pile_loss", "code_loss"]
    assert got == pytest.approx(want, 1e-5)
    assert seen == [(True, 2)] * 8
    said = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["wiki", "owt", "pile", "code"] * 2


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_random_tokens_as_transformer_lens(tl_evals, name, prepend_bos):
    # A vocabulary that has all tokens that are drawn.
    model = HookedTransformer(tiny(name, d_vocab=20_000, n_layers=1, d_mlp=4))

    class Tokenizer:
        bos_token_id = 7

    options = {
        "tokenizer": Tokenizer(), "batch_size": 2, "subseq_len": 9, "prepend_bos": prepend_bos,
    }  # fmt: skip
    results = []
    for function, which in ((tl_evals.induction_loss, theirs_of(model)), (induction_loss, model)):
        torch.manual_seed(3)
        results.append(function(which, device="cpu", **options))
    assert_close_to(results[1], results[0])
    assert not results[1].requires_grad


# -- small models and vocabularies ---------------------------------------------------------------


def test_a_model_with_induction_heads_is_told_from_one_without():
    """TransformerLens draws tokens that a small vocabulary has not."""
    toy = ours_toy()
    torch.manual_seed(0)
    skilled = induction_loss(toy, subseq_len=40)
    assert skilled < 0.5
    assert_close_to(skilled, induction_loss(toy, subseq_len=40, prepend_bos=False), atol=0.5)
    assert induction_loss(ours("gpt2"), subseq_len=20, prepend_bos=False) > 3


def test_the_mask_leaves_bos_alone_where_bos_pads():
    """Left padding is guessed from tokens; here there is none, whatever the first token is."""
    right, left = ours_toy(), ours_toy()
    for model, side in ((right, "right"), (left, "left")):
        model.tokenizer.pad_token = model.tokenizer.bos_token
        model.tokenizer.padding_side = side
        model.cfg.default_prepend_bos = False
    results = []
    for model in (right, left):
        torch.manual_seed(1)
        results.append(induction_loss(model, subseq_len=20, prepend_bos=True))
    assert_close_to(results[1], results[0])


def test_padded_batches_are_averaged_over_text():
    toy = ours_toy()
    texts = ["the cat and the cat", "Hi", "a dog"]
    batch = {"tokens": toy.to_tokens(texts)}
    alone = [toy(text, return_type="loss", loss_per_token=True)[0] for text in texts]
    truth = torch.cat(alone).mean().item()
    assert evaluate_on_dataset(toy, [batch]) == pytest.approx(truth, 1e-5)


def test_what_is_refused():
    toy = ours_toy()
    with pytest.raises(EvalError, match="gave no batch"):
        evaluate_on_dataset(toy, [])
    with pytest.raises(EvalError, match=r"two times 384 tokens.*context of 128.*subseq_len=64"):
        induction_loss(toy)
    with pytest.raises(TokenError, match="no tokenizer that has one"):
        induction_loss(ours("gpt2"), subseq_len=4)
