"""Head scores against their definitions, a model that does nothing else, and what is refused."""

import re
import weakref

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.analysis.head_scores import head_scores
from fastlens.errors import FastlensError, ShapeError
from tests.close import assert_close_to
from tests.configs import tiny
from tests.fixtures_tokens import gpt2_like
from tests.models import ours
from tests.patching.texts import text_model

KINDS = ("induction", "previous_token", "duplicate_token")


def by_definition(model, tokens, n):
    """Loops over the rows that the docstring names."""
    start = tokens.shape[1] - 2 * n
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    rows = []
    for layer in range(model.cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        copy = range(start + n, start + 2 * n)
        induction = torch.stack([pattern[:, :, i, i - (n - 1)] for i in copy]).mean(0)
        inside = range(start + 1, start + 2 * n)
        previous = torch.stack([pattern[:, :, i, i - 1] for i in inside]).mean(0)
        duplicate = torch.stack([pattern[:, :, i, i - n] for i in copy]).mean(0)
        rows.append(torch.stack([induction, previous, duplicate], 1))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("name", ["gpt2", "llama", "attn_only"])
def test_scores_are_what_the_docstring_says(name):
    model = ours(name)
    scores = head_scores(model, seq_len=9, batch=3, seed=4)
    tokens = _tokens_of(model, seq_len=9, batch=3, seed=4)
    assert_close_to(scores.per_example, by_definition(model, tokens, 9), atol=1e-6)
    assert_close_to(scores.values, scores.per_example.mean(0), atol=1e-6)
    assert scores.axes == ("kind", "layer", "head")
    assert scores.labels["kind"] == list(KINDS)
    assert scores.values.shape == (3, model.cfg.n_layers, model.cfg.n_heads)


def _tokens_of(model, **arguments):
    """The tokens head_scores gave to the model."""
    seen = []
    embed = model.embed.forward
    model.embed.forward = lambda tokens: (seen.append(tokens), embed(tokens))[1]
    try:
        head_scores(model, **arguments)
    finally:
        del model.embed.forward
    (tokens,) = seen
    return tokens


def test_the_tokens_are_one_sequence_twice_without_repetition():
    model = ours("gpt2")
    tokens = _tokens_of(model, seq_len=20, batch=5)
    assert tokens.shape == (5, 40)
    assert torch.equal(tokens[:, :20], tokens[:, 20:])
    assert all(len(set(row.tolist())) == 20 for row in tokens[:, :20])
    assert len({tuple(row.tolist()) for row in tokens}) == 5
    assert torch.equal(tokens, _tokens_of(model, seq_len=20, batch=5))
    assert not torch.equal(tokens, _tokens_of(model, seq_len=20, batch=5, seed=1))


def test_the_length_fits_the_context():
    model = ours("gpt2")
    assert _tokens_of(model).shape == (4, 64)
    assert head_scores(model).meta["seq_len"] == 32
    assert head_scores(ours("gpt2", n_ctx=512)).meta["seq_len"] == 50
    with pytest.raises(
        ShapeError, match="two times 33 tokens do not fit the model's context of 64"
    ):
        head_scores(model, seq_len=33)


def test_a_small_vocabulary_repeats_tokens():
    model = ours("gpt2", d_vocab=5)
    tokens = _tokens_of(model, seq_len=20)
    assert torch.equal(tokens[:, :20], tokens[:, 20:])


def test_bos_stands_in_front_and_special_tokens_stay_out():
    model = text_model()
    bos = model.tokenizer.bos_token_id
    tokens = _tokens_of(model, seq_len=10, batch=64)
    assert tokens.shape == (64, 21)
    assert bool((tokens[:, 0] == bos).all())
    assert torch.equal(tokens[:, 1:11], tokens[:, 11:])
    assert not bool((tokens[:, 1:] == bos).any())
    assert int(tokens.max()) < len(model.tokenizer), "rows of W_E that no text reaches"
    scores = head_scores(model, seq_len=10, batch=2)
    assert scores.meta["prepend_bos"]
    tokens = _tokens_of(model, seq_len=10, batch=2)
    assert_close_to(scores.per_example, by_definition(model, tokens, 10), atol=1e-6)


def test_no_bos_where_the_model_wants_none():
    model = HookedTransformer(
        tiny("gpt2", d_vocab=300, default_prepend_bos=False), tokenizer=gpt2_like()
    )
    assert _tokens_of(model, seq_len=10).shape == (4, 20)


def test_a_head_that_looks_one_back():
    """Positions alone decide: W_pos makes key i+1 what query i+1 looks for."""
    model = ours("gpt2", n_layers=1, n_heads=1, d_head=64, d_model=64, normalization_type=None)
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.zero_()
        model.W_pos.copy_(20 * torch.eye(64))
        # Queries are the position, keys the position after.
        model.blocks[0].attn.W_Q[0] = torch.eye(64)
        model.blocks[0].attn.W_K[0] = torch.eye(64).roll(1, 1)
    scores = head_scores(model)
    assert scores.select(kind="previous_token").values.item() == pytest.approx(1.0, abs=1e-3)
    assert scores.select(kind="induction").values.item() < 1e-3
    assert scores.select(kind="duplicate_token").values.item() < 1e-3


def test_losses_of_both_halves():
    model = ours("gpt2")
    scores = head_scores(model, seq_len=9, batch=3)
    tokens = _tokens_of(model, seq_len=9, batch=3)
    with torch.no_grad():
        log_probs = model(tokens).log_softmax(-1)
    loss = -log_probs[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    # Tokens 2 to 9 of each half are predicted at positions 0..7 and 9..16.
    assert scores.meta["loss_first_half"] == pytest.approx(loss[:, :8].mean().item(), rel=1e-5)
    assert scores.meta["loss_second_half"] == pytest.approx(loss[:, 9:17].mean().item(), rel=1e-5)


def test_losses_behind_a_bos():
    model = text_model()
    scores = head_scores(model, seq_len=9, batch=3)
    tokens = _tokens_of(model, seq_len=9, batch=3)
    with torch.no_grad():
        loss = model(tokens, return_type="loss", loss_per_token=True)
    assert scores.meta["loss_first_half"] == pytest.approx(loss[:, 1:9].mean().item(), rel=1e-5)
    assert scores.meta["loss_second_half"] == pytest.approx(loss[:, 10:18].mean().item(), rel=1e-5)


def test_your_own_tokens():
    model = ours("gpt2")
    half = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    scores = head_scores(model, tokens=torch.cat([half, half], 1))
    assert_close_to(
        scores.per_example, by_definition(model, torch.cat([half, half], 1), 4), atol=1e-6
    )
    assert (scores.meta["seq_len"], scores.meta["prepend_bos"]) == (4, False)
    front = torch.cat([torch.zeros(2, 1, dtype=torch.long), half, half], 1)
    scores = head_scores(model, tokens=front)
    assert_close_to(scores.per_example, by_definition(model, front, 4), atol=1e-6)
    for wrong in (half, torch.tensor([[1, 1]]), torch.cat([half, half.flip(1)], 1)):
        with pytest.raises(ShapeError, match="not a sequence of at least two tokens twice"):
            head_scores(model, tokens=wrong)


def test_some_kinds_only():
    model = ours("gpt2")
    whole = head_scores(model, seq_len=9)
    part = head_scores(model, seq_len=9, kinds=("duplicate_token", "induction"))
    assert_close_to(part.values, whole.values[[2, 0]])
    with pytest.raises(FastlensError, match=re.escape("Nearest: 'induction'")):
        head_scores(model, kinds=("inductoin",))
    with pytest.raises(FastlensError, match="kinds is empty"):
        head_scores(model, kinds=())


@pytest.mark.parametrize("arguments", [{"seq_len": 1}, {"batch": 0}])
def test_sizes_that_make_no_sense(arguments):
    with pytest.raises(ShapeError, match="must be at least"):
        head_scores(ours("gpt2"), **arguments)


def test_one_pattern_at_a_time_and_nothing_left_behind():
    """No pattern outlives its layer."""
    model = ours("gpt2").train()
    alive = []

    def watch(pattern, hook):
        assert not any(ref() is not None for ref in alive), "an earlier layer's pattern is kept"
        alive.append(weakref.ref(pattern))

    for layer in range(3):
        model.add_hook(f"blocks.{layer}.attn.hook_pattern", watch)
    scores = head_scores(model, seq_len=9)
    assert len(alive) == 3
    assert not scores.values.requires_grad
    assert torch.is_grad_enabled()
    assert all(len(point.fwd_hooks) <= 1 for point in model.hook_points())
