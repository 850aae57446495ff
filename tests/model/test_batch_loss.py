"""Losses of padded batches are those of their rows alone."""

import pytest
import torch

from fastlens.model.batch_loss import BatchError, batch_loss
from tests.close import assert_close_to
from tests.models import ours
from tests.toy import ours_toy

TEXTS = ["the cat and the cat", "Hi", "a dog"]


@pytest.fixture(scope="module")
def toy():
    return ours_toy()


def mean_of_rows(model, rows):
    """By hand: each row alone, the mean over all pairs of tokens."""
    losses = [model(row[None], return_type="loss", loss_per_token=True)[0] for row in rows]
    return torch.cat(losses).mean()


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_count_for_nothing(toy, side):
    tokens = toy.to_tokens(TEXTS, padding_side=side)
    pad = toy.tokenizer.pad_token_id
    assert pad not in (toy.tokenizer.bos_token_id, toy.tokenizer.eos_token_id)
    truth = mean_of_rows(toy, [row[row != pad] for row in tokens])
    assert_close_to(batch_loss(toy, {"tokens": tokens}), truth, atol=2e-6)
    mask = (tokens != pad).long()
    assert_close_to(batch_loss(toy, {"tokens": tokens, "attention_mask": mask}), truth, atol=2e-6)
    assert abs(toy(tokens, return_type="loss") - truth) > 0.1


def test_a_mask_of_your_own_needs_no_tokenizer():
    model = ours("llama")
    tokens = torch.randint(50, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    truth = mean_of_rows(model, [tokens[0], tokens[1, :4]])
    assert_close_to(batch_loss(model, {"tokens": tokens, "attention_mask": mask}), truth)


def test_without_padding_it_is_the_model_s_loss(toy):
    tokens = torch.randint(4, 100, (3, 20))
    for batch in ({"tokens": tokens}, {"tokens": tokens, "text": ["a", "b", "c"]}):
        assert torch.equal(batch_loss(toy, batch), toy(tokens, return_type="loss"))
    model = ours("gpt2")
    assert torch.equal(batch_loss(model, {"tokens": tokens % 50}), model(tokens % 50, "loss"))


def test_a_pad_token_that_is_eos_too_may_be_text():
    """Rows of concatenated texts end in EOS, or hold several where texts are empty."""
    toy = ours_toy()
    toy.tokenizer.pad_token = toy.tokenizer.eos_token
    tokens = torch.randint(4, 100, (3, 20))
    tokens[0, -2:] = toy.tokenizer.eos_token_id
    assert torch.equal(batch_loss(toy, {"tokens": tokens}), toy(tokens, return_type="loss"))


def test_the_padding_side_does_not_make_padding_of_text():
    """A tokenizer that pads left made the model mask what a row begins with."""
    toy = ours_toy()
    toy.tokenizer.pad_token = toy.tokenizer.eos_token
    tokens = torch.randint(4, 100, (3, 20))
    tokens[0, :3] = toy.tokenizer.eos_token_id
    right = batch_loss(toy, {"tokens": tokens})
    toy.tokenizer.padding_side = "left"
    assert_close_to(batch_loss(toy, {"tokens": tokens}), right)


def test_gradients_arrive(toy):
    batch_loss(toy, {"tokens": toy.to_tokens(TEXTS)}).backward()
    assert toy.W_E.grad is not None and bool(toy.W_E.grad.any())
    toy.zero_grad()


def test_a_batch_without_tokens(toy):
    with pytest.raises(BatchError, match=r"needs 'tokens'.*\['input_ids', 'labels'\]") as caught:
        batch_loss(toy, {"labels": 0, "input_ids": 0})
    assert isinstance(caught.value, KeyError)
