"""The names of `transformer_lens.utils` do what TransformerLens' own do."""

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fastlens import HookedTransformer, utils
from tests.close import assert_close_to
from tests.configs import tiny
from tests.fixtures_tokens import gpt2_like, reloadable
from tests.models import randomise


@pytest.fixture(scope="module")
def theirs() -> Any:
    pytest.importorskip("transformer_lens")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_lens.utilities as utilities
    return utilities


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    tokenizer = gpt2_like()
    model = HookedTransformer(tiny("gpt2", d_vocab=len(tokenizer)), tokenizer=tokenizer)
    randomise(model)
    return model


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"no utils\.to_nunpy .* Nearest: 'to_numpy'"):
        _ = utils.to_nunpy
    with pytest.raises(ImportError):
        from fastlens.compat.utils import evals  # noqa: F401


@pytest.mark.tl
def test_every_name_exists_in_transformer_lens_with_its_arguments(theirs):
    for name in utils.__all__:
        their = getattr(theirs, name)
        ours = getattr(utils, name)
        if not inspect.isfunction(their):
            continue
        wanted, found = (list(inspect.signature(f).parameters) for f in (their, ours))
        # The only argument of an activation function is never named.
        assert len(wanted) == 1 or not set(wanted) - set(found), name


@pytest.mark.tl
@pytest.mark.parametrize(
    "value",
    [
        torch.arange(3.0, requires_grad=True),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([True]),
        [1, 2],
        (1.5, 2),
        np.eye(2),
        3,
        2.5,
        True,
    ],
    ids=repr,
)
def test_to_numpy(theirs, value):
    ours, their = utils.to_numpy(value), theirs.to_numpy(value)
    assert isinstance(ours, np.ndarray) and ours.dtype == their.dtype
    assert np.array_equal(ours, their)


def test_to_numpy_refuses_the_rest():
    with pytest.raises(ValueError, match="takes a tensor"):
        utils.to_numpy({1, 2})


def test_small_things_about_shapes():
    x = torch.arange(24).view(1, 4, 6)
    assert torch.equal(utils.get_corner(x, 2), x[:2, :2, :2])
    assert utils.get_corner(x).shape == (1, 3, 3)
    assert utils.remove_batch_dim(x).shape == (4, 6)
    assert utils.remove_batch_dim(x[0]) is not None and utils.remove_batch_dim(x[0]).shape == (4, 6)
    assert torch.equal(utils.transpose(x), x.mT)
    assert utils.is_square(torch.eye(3)) and not utils.is_square(x)
    assert utils.is_lower_triangular(torch.ones(3, 3).tril())
    assert not utils.is_lower_triangular(torch.ones(3, 3))
    assert not utils.is_lower_triangular(torch.zeros(3, 2))


@pytest.mark.tl
def test_what_transformer_lens_computes(theirs):
    logits = torch.randn(2, 5, 7)
    tokens = torch.randint(0, 7, (2, 5))
    for per_token in (False, True):
        assert torch.equal(
            utils.lm_accuracy(logits, tokens, per_token),
            theirs.lm_accuracy(logits, tokens, per_token),
        )
        assert_close_to(
            utils.lm_cross_entropy_loss(logits, tokens, per_token=per_token),
            theirs.lm_cross_entropy_loss(logits, tokens, per_token=per_token),
            atol=1e-6,
        )
    repeated = utils.repeat_along_head_dimension(logits, 3)
    assert torch.equal(repeated, theirs.repeat_along_head_dimension(logits, 3))
    assert repeated.is_contiguous()
    view = utils.repeat_along_head_dimension(logits, 3, clone_tensor=False)
    assert torch.equal(view, repeated) and view.data_ptr() == logits.data_ptr()
    weights = {"h.0.a": 1, "h.0.b.c": 2, "h.1.a": 3, "h.01": 4}
    for prefix in ("h.0", "h.0.", "x"):
        assert utils.filter_dict_by_prefix(weights, prefix) == theirs.filter_dict_by_prefix(
            weights, prefix
        )
    assert utils.get_device() == theirs.get_device()
    assert utils.get_act_name("k", 3) == theirs.get_act_name("k", 3)


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
def test_test_prompt_prints_the_same_lines(theirs, model, capsys, options, monkeypatch, tmp_path):
    import transformer_lens

    monkeypatch.setenv("COLUMNS", "500")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = transformer_lens.HookedTransformerConfig(**tiny("gpt2", d_vocab=model.cfg.d_vocab))
        other = transformer_lens.HookedTransformer(cfg, tokenizer=reloadable(gpt2_like(), tmp_path))
    randomise(other)
    answer = options.pop("answer")
    utils.test_prompt("the cat in", answer, model, **options)
    ours = capsys.readouterr().out
    theirs.test_prompt("the cat in", answer, other, **options)
    assert ours.splitlines() == capsys.readouterr().out.splitlines()


def test_test_prompt_is_no_test():
    assert utils.test_prompt.__test__ is False
