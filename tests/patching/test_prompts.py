"""Pairs of prompts: token counts, labels, and what is refused."""

import re

import pytest
import torch

from fastlens.errors import SweepError, TokenError
from fastlens.patching.prompts import Prompts, position_labels, prompt_record, prompts_of
from tests.models import ours, prompts
from tests.patching.texts import text_model


def test_text_is_tokenized_with_the_models_defaults():
    model = text_model()
    pair = prompts_of(model, "the cat in a", "the cat on a")
    assert torch.equal(pair.clean, model.to_tokens("the cat in a"))
    assert torch.equal(pair.corrupted, model.to_tokens("the cat on a"))
    assert (pair.batch, pair.n_pos) == pair.clean.shape


def test_lists_and_tokens():
    model = text_model()
    pair = prompts_of(model, ["the cat", "the the"], ["a cat"[0] + " cat", "a the"])
    assert pair.clean.shape == (2, 3)
    tokens = prompts(1, 4)
    pair = prompts_of(ours("gpt2"), tokens[0], tokens.int())
    assert pair.clean.shape == (1, 4)
    assert pair.corrupted.dtype == torch.long


def test_different_token_counts_are_shown_aligned():
    with pytest.raises(SweepError) as caught:
        prompts_of(text_model(), "the cat in a", "the dog in a")
    lines = str(caught.value).splitlines()
    assert "the clean prompt has 6 tokens and the corrupted one 9" in lines[0]
    assert re.search(r"clean \(6\): .*the\| cat", lines[1])
    assert re.search(r"corrupted \(9\): .*the\| ", lines[2])
    assert "^" in lines[3]


def test_the_pair_that_does_not_match_is_named():
    with pytest.raises(SweepError, match="pair 1: the clean prompt has 2 tokens"):
        prompts_of(text_model(), ["a", "a"], ["a", "a cat"])


def test_different_token_counts_without_a_tokenizer():
    with pytest.raises(SweepError, match=r"clean \(3\): 1\|2\|3"):
        prompts_of(ours("gpt2"), torch.tensor([1, 2, 3]), torch.tensor([1, 3]))


@pytest.mark.parametrize(
    ("clean", "corrupted", "message"),
    [
        (["a", "a cat"], ["a", "a the"], "pairs have 2, 3 tokens"),
        (["a", "a"], ["a"], "2 clean prompts and 1 corrupted"),
        ([], [], "empty"),
        (3, "a", "got int"),
        ([1, 2], "a", "got list"),
        ("the" * 70, "the" * 70, "the model takes 1 to 64"),
    ],
)
def test_text_that_cannot_be_swept(clean, corrupted, message):
    with pytest.raises(SweepError, match=message):
        prompts_of(text_model(), clean, corrupted)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(1, 2, 3), SweepError, r"torch.float32 tensor of shape \[1, 2, 3\]"),
        (torch.zeros(2, 3, 4, dtype=torch.long), SweepError, r"shape \[2, 3, 4\]"),
        (torch.tensor([[1, 50]]), TokenError, "token 50; the vocabulary has 50"),
        (torch.tensor([[-1, 2]]), TokenError, "token -1"),
        (torch.zeros(1, 0, dtype=torch.long), SweepError, "have 0 tokens"),
    ],
)
def test_tokens_that_cannot_be_swept(tokens, error, message):
    with pytest.raises(error, match=message):
        prompts_of(ours("gpt2"), tokens, tokens)


def test_text_without_a_tokenizer():
    with pytest.raises(TokenError, match="tokenizer"):
        prompts_of(ours("gpt2"), "a", "b")


def test_direction_says_which_prompt_is_run():
    pair = Prompts(clean=torch.tensor([[1]]), corrupted=torch.tensor([[2]]))
    assert [int(t) for t in pair.base_and_source("denoising")] == [2, 1]
    assert [int(t) for t in pair.base_and_source("noising")] == [1, 2]


def test_labels_name_both_tokens_where_they_differ():
    model = text_model()
    labels = position_labels(model, prompts_of(model, "the cat on", "the cat in"))
    assert labels[0].endswith("|>:0")
    assert labels[1:3] == ["the:1", " cat:2"]
    assert labels[-1] == "on/in:4" or labels[-2:] == [" :3", "on/in:4"]


def test_labels_of_a_batch_and_of_bare_tokens():
    model = text_model()
    pair = prompts_of(model, ["the cat", "the the"], ["the the", "the the"])
    assert position_labels(model, pair)[1:] == ["the:1", "2"]
    tokens = prompts(2, 3)
    assert position_labels(ours("gpt2"), Prompts(tokens, tokens)) == ["0", "1", "2"]


def test_records():
    assert prompt_record("a") == "a"
    assert prompt_record(("a", "b")) == ["a", "b"]
    assert prompt_record(torch.tensor([[1, 2]])) == [[1, 2]]
