"""The logit lens: the last layer is the model, and every other what the docstring says."""

import inspect

import pytest
import torch

from fastlens.analysis import logit_lens as module
from fastlens.analysis.logit_lens import logit_lens
from fastlens.errors import FastlensError, SweepError, TokenError
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS
from tests.encoders import ours as encoder
from tests.models import ours, prompts
from tests.patching.against_hooks import mask_of
from tests.patching.texts import text_model

ALL = ("logit", "logit_diff", "probability", "rank")


def measured(logits, answer, wrong):
    """By definition, of logits [..., d_vocab] and ids [...]."""
    mine = logits.gather(-1, answer[..., None])[..., 0]
    other = logits.gather(-1, wrong[..., None])[..., 0]
    probability = logits.softmax(-1).gather(-1, answer[..., None])[..., 0]
    rank = (logits > mine[..., None]).sum(-1).to(logits)
    return torch.stack([mine, mine - other, probability, rank], 1)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_layer_by_definition_and_the_last_is_the_model(name):
    model = ours(name, dtype=torch.float64)
    tokens = prompts(3, 9)
    scores = logit_lens(model, tokens, [1, 2, 3], 7, measure=ALL)
    answer = torch.tensor([1, 2, 3])[:, None].expand(3, 9)
    wrong = torch.full((3, 9), 7)
    with torch.no_grad():
        final, cache = model.run_with_cache(tokens)
        assert_close_to(scores.per_example[:, :, -1], measured(final, answer, wrong), atol=1e-11)
        for layer in range(model.cfg.n_layers):
            stopped = model(cache["resid_pre", layer], start_at_layer=model.cfg.n_layers)
            truth = measured(stopped, answer, wrong)
            assert_close_to(scores.per_example[:, :, layer], truth, atol=1e-11)
    assert scores.axes == ("metric", "layer", "pos")
    layers = [f"L{layer}" for layer in range(model.cfg.n_layers)]
    assert scores.labels["layer"] == ["embed", *layers]
    assert scores.select(metric="rank").unit == "rank"
    assert_close_to(scores.values, scores.per_example.mean(0), atol=1e-12)


def test_answers_alone_are_the_same_as_the_whole_vocabulary(monkeypatch):
    model = ours("softcap", dtype=torch.float64)
    tokens = prompts(2, 9)
    widths = []
    plain = module.logits_of
    monkeypatch.setattr(module, "logits_of", lambda u, x, c: (widths.append(c), plain(u, x, c))[1])
    narrow = logit_lens(model, tokens, [5, 3], [3, 4])
    assert all(columns.tolist() == [3, 4, 5] for columns in widths)
    wide = logit_lens(model, tokens, [5, 3], [3, 4], measure=("logit_diff", "rank"))
    assert_close_to(narrow.values, wide.select(metric="logit_diff").values, atol=1e-12)
    assert narrow.unit == "logits" and "top_tokens" not in narrow.meta
    assert narrow.title == "logit lens, logit diff"


def test_by_default_the_models_own_choice():
    model = ours("gpt2")
    tokens = prompts(2, 9)
    with torch.no_grad():
        final = model(tokens)
    ranks = logit_lens(model, tokens, measure="rank")
    assert not ranks.values[-1].any() and ranks.values[0].any()
    assert ranks.meta["answers"] == [final.argmax(-1).tolist()]
    assert ranks.meta["top_tokens"][-1] == final[0].argmax(-1).tolist()
    probability = logit_lens(model, tokens)
    assert_close_to(probability.per_example[:, -1], final.softmax(-1).amax(-1), atol=1e-6)
    assert "own first choice" in probability.title


def test_positions_rows_at_a_time_and_labels(monkeypatch):
    model = text_model()
    whole = logit_lens(model, "The cat sat on", 3)
    monkeypatch.setattr(module, "LOGIT_BYTES", 1)
    part = logit_lens(model, "The cat sat on", 3, positions=[-1, 0])
    assert_close_to(part.values, whole.values[:, [-1, 0]], atol=1e-6)
    assert part.labels["pos"] == [whole.labels["pos"][-1], whole.labels["pos"][0]]
    assert whole.labels["pos"][0].endswith(":0")
    assert all(isinstance(token, str) for row in whole.meta["top_tokens"] for token in row)
    assert len(whole.meta["top_tokens"]) == model.cfg.n_layers + 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_left_out(name, padding):
    model = ours(name, dtype=torch.float64)
    tokens = prompts(3, 9)
    mask = mask_of(padding, 3, 9)
    scores = logit_lens(model, tokens, 3, measure=("probability", "rank"), attention_mask=mask)
    for i in range(3):
        kept = mask[i] == 1
        alone = logit_lens(model, tokens[i][kept], 3, measure=("probability", "rank"))
        assert_close_to(scores.per_example[i][..., kept], alone.values, atol=1e-12)
        assert scores.per_example[i][..., ~kept].isnan().all()
    assert not scores.values.isnan().any()


def test_texts_of_different_lengths():
    model = text_model()
    texts = ["The cat sat", "The dog sat on the mat"]
    scores = logit_lens(model, texts, 3, positions=-1)
    for i, text in enumerate(texts):
        alone = logit_lens(model, text, 3, positions=-1)
        assert_close_to(scores.per_example[i], alone.values, atol=1e-6)


def test_hooks_and_foreign_modules_are_seen():
    model = ours("gpt2", dtype=torch.float64)
    tokens = prompts(2, 9)
    model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 2 * x)
    model.add_hook("ln_final.hook_normalized", lambda x, hook: 3 * x)
    scores = logit_lens(model, tokens, 3, 7)
    with torch.no_grad():
        final = model(tokens)
    assert_close_to(scores.per_example[:, -1], final[..., 3] - final[..., 7], atol=1e-11)


@pytest.mark.parametrize("place", ["ln_final.hook_normalized", "unembed.hook_in"])
def test_hooks_at_the_end_see_the_whole_batch_and_all_positions(place):
    """A hook that edits one position of one example edits no other."""
    model = ours("gpt2", dtype=torch.float64)
    tokens = prompts(3, 9)

    def one_place(activation, hook):
        activation = activation.clone()
        activation[1, 5], activation[:, -1] = 0.0, 2 * activation[:, -1]
        return activation

    model.add_hook(place, one_place)
    with torch.no_grad():
        final = model(tokens)
    for at in (None, [-1, 5, 0]):
        scores = logit_lens(model, tokens, 3, positions=at, measure="logit")
        want = final[..., 3] if at is None else final[:, at, 3]
        assert_close_to(scores.per_example[:, -1], want, atol=1e-11)
    by_default = logit_lens(model, tokens)
    best = final.softmax(-1).amax(-1)
    assert_close_to(by_default.per_example[:, -1], best, atol=1e-11)


def test_a_stream_that_says_one_token_says_it():
    """W_U is the identity and layers do nothing: each layer answers the token it was given."""
    model = ours(
        "no_norm", d_model=32, d_vocab=32, positional_embedding_type="rotary", rotary_dim=8
    )
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.zero_()
            if name in ("embed.W_E", "unembed.W_U"):
                leaf.copy_(torch.eye(32))
    scores = logit_lens(model, torch.tensor([[4, 9, 4]]), 4, measure="logit")
    assert scores.values.tolist() == [[1.0, 0.0, 1.0]] * 3


def test_what_is_refused():
    model, tokens = ours("gpt2"), prompts(2, 9)
    with pytest.raises(FastlensError, match="Nearest: 'probability'"):
        logit_lens(model, tokens, 3, measure="probabilty")
    with pytest.raises(FastlensError, match="give wrong= too"):
        logit_lens(model, tokens, 3, measure="logit_diff")
    with pytest.raises(FastlensError, match="give answer= too"):
        logit_lens(model, tokens, wrong=3)
    with pytest.raises(FastlensError, match="names one twice"):
        logit_lens(model, tokens, 3, measure=("rank", "rank"))
    with pytest.raises(TokenError, match="3 answers for 2 prompts"):
        logit_lens(model, tokens, [1, 2, 3])
    with pytest.raises(SweepError, match="out of range"):
        logit_lens(model, tokens, 3, positions=9)
    with pytest.raises(SweepError, match="a HookedEncoder cannot be swept"):
        inspect.unwrap(logit_lens)(encoder(), tokens, 3)
