"""`test_prompt` prints what TransformerLens' prints."""

import warnings

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.compat.utilities import exploratory_utils
from tests.configs import tiny
from tests.fixtures_tokens import gpt2_like, reloadable
from tests.models import randomise

COMPARED = ["transformer_lens.utilities.exploratory_utils.test_prompt"]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    tokenizer = gpt2_like()
    model = HookedTransformer(tiny("gpt2", d_vocab=len(tokenizer)), tokenizer=tokenizer)
    randomise(model)
    return model


@pytest.mark.tl
@pytest.mark.parametrize(
    "options",
    [
        {"answer": " the"},
        {"answer": "the cat", "top_k": 3},
        {"answer": ["the", " a", "cat"], "top_k": 2, "prepend_space_to_answer": False},
        {"answer": "hat", "print_details": False, "prepend_bos": False},
        {"answer": ["hat", "cat"], "print_details": False},
    ],
    ids=repr,
)
def test_the_same_lines(theirs, model, capsys, options, monkeypatch, tmp_path):
    import transformer_lens

    monkeypatch.setenv("COLUMNS", "500")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = transformer_lens.HookedTransformerConfig(**tiny("gpt2", d_vocab=model.cfg.d_vocab))
        other = transformer_lens.HookedTransformer(cfg, tokenizer=reloadable(gpt2_like(), tmp_path))
    randomise(other)
    answer = options.pop("answer")
    exploratory_utils.test_prompt("the cat in", answer, model, **options)
    ours = capsys.readouterr().out
    theirs("exploratory_utils").test_prompt("the cat in", answer, other, **options)
    assert ours.splitlines() == capsys.readouterr().out.splitlines()


def test_tokens_that_look_like_markup(model, capsys):
    """TransformerLens prints with rich, which takes ``[b]`` for markup and drops it."""
    exploratory_utils.test_prompt("the", "[b]", model, prepend_space_to_answer=False)
    assert "Token: |[|" in capsys.readouterr().out


def test_padding_on_the_left_is_no_answer(model, capsys):
    """TransformerLens takes the first column of the padded answers, which is padding there."""
    printed = []
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        exploratory_utils.test_prompt("the", ["the cat in", " a"], model)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_it_is_no_test():
    assert exploratory_utils.test_prompt.__test__ is False  # type: ignore[attr-defined]


def test_no_graph_is_kept(model):
    """Logits that require a gradient can be printed."""
    assert torch.is_grad_enabled()
    exploratory_utils.test_prompt("the", " a", model, print_details=False)
