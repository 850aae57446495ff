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


# -- pairs of different lengths ------------------------------------------------------------------


def test_pairs_of_different_lengths_are_padded_on_the_left():
    model = text_model()
    pair = prompts_of(model, ["a", "the cat"], ["a", "the the"])
    assert pair.is_padded and (pair.batch, pair.n_pos) == (2, 3)
    pad = model.tokenizer.pad_token_id
    for tokens, texts in [(pair.clean, ["a", "the cat"]), (pair.corrupted, ["a", "the the"])]:
        rows = [model.to_tokens(text)[0].tolist() for text in texts]
        assert tokens[0].tolist() == [pad, *rows[0]]
        assert tokens[1].tolist() == rows[1]
    assert pair.mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    # Position -1 is everybody's last token, so positions are counted from there.
    assert position_labels(model, pair) == ["-3", "-2", "-1"]


def test_pairs_of_one_length_are_not_padded():
    pair = prompts_of(text_model(), ["a", "the"], ["the", "a"])
    assert not pair.is_padded and pair.mask is None


def test_an_attention_mask_goes_with_tokens_of_its_shape():
    model, tokens = ours("gpt2"), prompts(2, 4)
    mask = [[0, 1, 1, 1], [1, 1, 1, 1]]
    pair = prompts_of(model, tokens, tokens, mask)
    assert pair.mask.tolist() == mask and pair.mask.dtype == torch.long
    assert not pair.is_padded
    assert prompts_of(model, tokens, tokens, torch.tensor(mask).bool()).mask.tolist() == mask
    with pytest.raises(
        SweepError, match=r"attention_mask has shape \[2, 3\], the prompts \[2, 4\]"
    ):
        prompts_of(model, tokens, tokens, torch.ones(2, 3))
    for other in (torch.tensor(mask) * 0.5, (1 - torch.tensor(mask)) * -1e4):
        with pytest.raises(SweepError, match="other values than 0"):
            prompts_of(model, tokens, tokens, other)
    with pytest.raises(SweepError, match="not with ragged prompts"):
        prompts_of(text_model(), ["a", "the cat"], ["a", "the the"], torch.ones(2, 3))


class OtherPad:
    """A tokenizer with another pad token."""

    def __init__(self, tokenizer, pad_token_id):
        self.tokenizer, self.pad_token_id = tokenizer, pad_token_id

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize(("token", "used"), [(7, 7), (None, 0), (-1, 0), (300, 0)])
def test_padding_is_masked_so_any_token_of_the_vocabulary_will_do(monkeypatch, token, used):
    model = text_model()
    monkeypatch.setattr(model, "tokenizer", OtherPad(model.tokenizer, token))
    pair = prompts_of(model, ["a", "the cat"], ["a", "the the"])
    assert (int(pair.clean[0, 0]), int(pair.mask[0, 0])) == (used, 0)


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
