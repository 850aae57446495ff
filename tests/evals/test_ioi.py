"""IOI: TransformerLens' sentences for a seed, its scores, and the traps of tokenizers."""

import random

import pytest
import torch

from fastlens.errors import TokenError
from fastlens.evals import IOIDataset, ioi, ioi_eval
from fastlens.evals.ioi import IOIError
from fastlens.model.hooked_transformer import HookedTransformer
from tests.configs import tiny
from tests.fixtures_tokens import char_tokenizer, gpt2_like, llama_like, pad_is_eos, t5_like
from tests.toy import ours_toy, theirs_of

COMPARED = [
    "transformer_lens.evals.IOIDataset",
    "transformer_lens.evals.IOIDataset.get_default_names",
    "transformer_lens.evals.IOIDataset.get_default_nouns",
    "transformer_lens.evals.IOIDataset.get_default_templates",
    "transformer_lens.evals.IOIDataset.get_sample",
    "transformer_lens.evals.ioi_eval",
]
OWN = {
    "templates": ["[A] met [B] in the [PLACE]. [B] saw [A]", "[B], [PLACE], [A], [B] and [A]"],
    "names": ["Ann", "Bob", "Cid"],
    "nouns": {"PLACE": ["park", "zoo"]},
}


@pytest.fixture
def seeded(monkeypatch):
    """Start both libraries' random draws anew.

    Not the global generator itself: beartype, which checks calls in tests, draws from it as well.
    """

    def seed(number, *modules):
        for module in modules:
            monkeypatch.setattr(module, "random", random.Random(number))

    return seed


@pytest.fixture
def tl_evals(seeded):
    pytest.importorskip("transformer_lens")
    from transformer_lens import evals

    seeded(0, evals)
    return evals


def loud_model(name="gpt2", tokenizer=None, **changes):
    """Weights so large that sentences differ."""
    model = HookedTransformer(
        tiny(name, d_vocab=271, n_ctx=128, initializer_range=0.3, **changes),
        tokenizer=tokenizer or gpt2_like(),
    )
    return model.eval()


# -- against TransformerLens ---------------------------------------------------------------------


@pytest.mark.tl
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("own", [{}, OWN], ids=["default", "own"])
def test_sentences_as_transformer_lens(tl_evals, own, symmetric):
    # Neither tokenizer adds BOS by itself; with those that do, TransformerLens has two.
    for tokenizer in (gpt2_like(), pad_is_eos()):
        for prepend_bos in (True, False):
            options = {
                "num_samples": 21, "symmetric": symmetric, "prepend_bos": prepend_bos, "seed": 42,
                **own,
            }  # fmt: skip
            want = tl_evals.IOIDataset(tokenizer, **options)
            got = IOIDataset(tokenizer, **options)
            assert got.samples == want.samples and len(got) == len(want) == (
                20 if symmetric else 21
            )
            for mine, their in zip(got, want, strict=False):
                assert {k: v.tolist() for k, v in mine.items()} == {
                    k: v.tolist() for k, v in their.items()
                }
            # Both go on drawing from the same place.
            assert got.get_sample(symmetric=True) == want.get_sample(symmetric=True)
    assert got.get_default_names() == want.get_default_names()
    assert got.get_default_nouns() == want.get_default_nouns()
    assert got.get_default_templates() == want.get_default_templates()


@pytest.mark.tl
def test_sentences_of_the_global_generator_as_transformer_lens(tl_evals, seeded):
    assert ioi.random is random
    seeded(3, ioi, tl_evals)
    results = [cls(gpt2_like(), num_samples=5).samples for cls in (tl_evals.IOIDataset, IOIDataset)]
    assert results[0] == results[1]
    assert ioi.random.random() == tl_evals.random.random()


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scores_as_transformer_lens(tl_evals, seeded, name, symmetric):
    model = loud_model(name)
    other = theirs_of(model)
    # Not the models' own, which add BOS.
    tokenizer = gpt2_like()
    own = IOIDataset(tokenizer, num_samples=12, seed=1, prepend_bos=False, **OWN)
    for dataset in (None, own):
        results = []
        seeded(5, ioi, tl_evals)
        for function, which in ((tl_evals.ioi_eval, other), (ioi_eval, model)):
            results.append(
                function(
                    which, dataset, batch_size=5, num_samples=14, tokenizer=tokenizer,
                    symmetric=symmetric,
                )
            )  # fmt: skip
        assert list(results[1]) == ["Logit Difference", "Accuracy"]
        assert results[1] == pytest.approx(results[0], abs=1e-5)


# -- right where tokenizers differ ---------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2_like, llama_like, pad_is_eos, t5_like])
def test_one_bos_and_no_eos_whatever_the_tokenizer_adds(make):
    model = loud_model(tokenizer=make())
    tokenizer = model.tokenizer
    item = IOIDataset(tokenizer, num_samples=1, seed=0, **OWN)[0]
    text = tokenizer.decode(item["prompt"][1:])
    assert item["prompt"][0] == tokenizer.bos_token_id
    assert text == IOIDataset(tokenizer, num_samples=1, seed=0, **OWN).samples[0]["text"]
    assert tokenizer.decode(item["IO"]) in (" Ann", " Bob", " Cid")
    assert text.endswith(tokenizer.decode(item["IO"]))


def test_the_toy_model_says_the_name_that_was_said_once():
    """By hand: the model's own logits before the first letter in which the names differ."""
    toy = ours_toy()
    data = IOIDataset(toy.tokenizer, num_samples=10, seed=0)
    differences = []
    for sample in data.samples:
        start = sample["text"][: -len(sample["IO"]) + 1]  # up to the space
        logits = toy(start)[0, -1].detach()
        right, wrong = (toy.to_single_token(sample[name][1]) for name in ("IO", "S"))
        differences.append(float(logits[right] - logits[wrong]))
    scores = ioi_eval(toy, data, batch_size=4)
    assert scores["Logit Difference"] == pytest.approx(sum(differences) / 10, abs=1e-4)
    assert scores["Accuracy"] == sum(x > 0 for x in differences) / 10


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "bidirectional"])
def test_padding_changes_nothing(name, side):
    """TransformerLens masks nothing: wrong where later tokens are seen."""
    model = loud_model(name)
    model.tokenizer.padding_side = side
    data = IOIDataset(model.tokenizer, num_samples=8, seed=2)
    assert len({len(item["prompt"]) for item in (data[i] for i in range(8))}) > 1
    assert ioi_eval(model, data, batch_size=8) == pytest.approx(
        ioi_eval(model, data, batch_size=1), abs=1e-5
    )


def test_a_seed_does_not_reseed_the_process(monkeypatch):
    monkeypatch.setattr(random, "seed", lambda *seed: pytest.fail("reseeded"))
    monkeypatch.setattr(random, "choice", lambda *items: pytest.fail("drawn from"))
    assert len(IOIDataset(gpt2_like(), num_samples=3, seed=9)) == 3


# -- what is refused -----------------------------------------------------------------------------


def test_what_is_refused():
    model = loud_model()
    tokenizer = model.tokenizer
    stop = IOIDataset(tokenizer, templates=["[A] met [B]. [B] saw [A]."], num_samples=2, seed=0)
    with pytest.raises(IOIError, match="must end with the tokens of IO"):
        ioi_eval(model, stop)
    same = {"prompt": torch.tensor([1, 2, 3]), "IO": torch.tensor([3]), "S": torch.tensor([3, 4])}
    with pytest.raises(IOIError, match=r"told apart: their tokens are \[3\] \(IO\)"):
        ioi_eval(model, [same])
    with pytest.raises(IOIError, match="no sentence"):
        ioi_eval(model, num_samples=1, symmetric=True)
    with pytest.raises(TokenError, match="no BOS"):
        IOIDataset(char_tokenizer(), num_samples=1)[0]
