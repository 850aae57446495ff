"""MMLU on questions of our own, against TransformerLens on the same."""

import pytest
import torch

from fastlens.errors import SourceError, TokenError
from fastlens.evals import MMLU_ANSWER_LETTERS, MMLU_SUBJECTS, make_mmlu_data_loader, mmlu_eval
from fastlens.evals.mmlu import MMLUError
from fastlens.model.hooked_transformer import HookedTransformer
from tests.configs import tiny
from tests.fixtures_tokens import gpt2_like, llama_like, t5_like
from tests.toy import theirs_of

COMPARED = [
    "transformer_lens.evals.MMLU_ANSWER_LETTERS",
    "transformer_lens.evals.MMLU_SUBJECTS",
    "transformer_lens.evals.make_mmlu_data_loader",
    "transformer_lens.evals.mmlu_eval",
]
WORDS = "cat car can Hi the an in one her".split()


def questions(subject, n=7):
    return [
        {
            "question": f"{WORDS[i % 9]} in {subject}?",
            "choices": [WORDS[(i * k + k) % 9] for k in (1, 2, 4, 5)],
            "answer": (i * i) % 4,
            "more": "not read",
        }
        for i in range(n)
    ]


def fake_load_dataset(path, subject, split):
    assert path == "cais/mmlu" and split in ("test", "dev")
    return questions(subject + split)


def model_of(tokenizer, **changes):
    config = tiny("gpt2", d_vocab=271, n_ctx=128, initializer_range=0.4, **changes)
    return HookedTransformer(config, tokenizer=tokenizer).eval()


@pytest.fixture
def no_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", fake_load_dataset)


@pytest.fixture
def tl_evals(monkeypatch, no_hub):
    pytest.importorskip("transformer_lens")
    from transformer_lens import evals

    monkeypatch.setattr(evals, "load_dataset", fake_load_dataset)
    return evals


# -- against TransformerLens ---------------------------------------------------------------------


@pytest.mark.tl
def test_questions_as_transformer_lens(tl_evals, capsys):
    assert tl_evals.MMLU_SUBJECTS == MMLU_SUBJECTS
    assert tl_evals.MMLU_ANSWER_LETTERS == MMLU_ANSWER_LETTERS
    for options in (
        {},
        {"subjects": "anatomy", "num_samples": 3},
        {"subjects": ["virology", "prehistory"], "split": "dev", "num_samples": 100},
    ):
        assert make_mmlu_data_loader(**options) == tl_evals.make_mmlu_data_loader(**options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == lines[1::2]


@pytest.mark.tl
@pytest.mark.parametrize("make", [gpt2_like, llama_like])
def test_accuracy_as_transformer_lens(tl_evals, make):
    model = model_of(make())
    other = theirs_of(model)
    for options in (
        {"subjects": ["virology", "anatomy", "sociology", "nutrition"]},
        {"subjects": "marketing", "split": "dev", "num_samples": 5, "tokenizer": make()},
    ):
        got, want = mmlu_eval(model, **options), tl_evals.mmlu_eval(other, **options)
        assert got == want
    assert 0 < got["accuracy"] < 1 or got["num_total"] == 5


# -- by hand -------------------------------------------------------------------------------------


def test_given_questions_by_hand():
    model = model_of(gpt2_like())
    tokenizer = model.tokenizer
    data = [{**row, "subject": "mine"} for row in questions("mine", 9)]
    expected = []
    for row in data:
        lines = [
            f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)
        ]
        prompt = f"Question: {row['question']}\nChoices:\n" + "\n".join(lines) + "\nAnswer:"
        logits = model(prompt)[0, -1]
        letters = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "ABCD"]
        expected.append(int(logits[letters].argmax()) == row["answer"])
    result = mmlu_eval(model, data=data)
    assert result["num_total"] == 9 and result["num_correct"] == sum(expected)
    assert result["accuracy"] == sum(expected) / 9 == result["subject_scores"]["mine"]


def test_five_choices_and_a_tokenizer_that_appends_eos():
    model = model_of(t5_like())
    row = {"question": "Hi", "choices": list("vwxyz"), "answer": 0, "subject": "s"}
    prompt = "Question: Hi\nChoices:\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:"
    tokens = model.tokenizer.encode(prompt, add_special_tokens=False)
    logits = model(torch.tensor([tokens]))[0, -1]
    letters = [model.tokenizer.encode(c, add_special_tokens=False)[0] for c in "ABCDE"]
    for answer in range(5):
        result = mmlu_eval(model, data=[{**row, "answer": answer}])
        assert result["num_correct"] == (int(logits[letters].argmax()) == answer)


# -- what is refused -----------------------------------------------------------------------------


def test_offline_the_dataset_is_named():
    """TransformerLens prints a warning and goes on with the subjects it could load."""
    pytest.importorskip("datasets")
    with pytest.raises(SourceError, match="'cais/mmlu'"):
        mmlu_eval(model_of(gpt2_like()), subjects="anatomy")


def test_what_is_refused(no_hub):
    with pytest.raises(ValueError, match="no subject 'anatmy'.*Nearest: 'anatomy'"):
        make_mmlu_data_loader(["virology", "anatmy"])
    with pytest.raises(MMLUError, match="no questions"):
        mmlu_eval(model_of(gpt2_like()), subjects=[])

    class Deaf:
        eos_token_id = None

        def encode(self, text, add_special_tokens=True):
            return [0]

    row = {"question": "Hi", "choices": list("wxyz"), "answer": 0, "subject": "s"}
    # Some datasets give the letter; none of these could ever be right.
    for answer in ("A", "0", 4, -1, 0.0, None):
        with pytest.raises(MMLUError, match=r"must be the number of a choice, 0 to 3"):
            mmlu_eval(model_of(gpt2_like()), data=[{**row, "answer": answer}])
    with pytest.raises(TokenError, match=r"no token of its own for each of the letters ABCD"):
        mmlu_eval(model_of(gpt2_like()), Deaf(), data=[row])
