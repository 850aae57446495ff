"""Rows and columns that an index names, what is asked for them, and what is remembered."""

import operator

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlens.patching import logit_index
from fastlens.patching.logit_index import LogitIndex, all_logits

BATCH, N_POS, D_VOCAB = 3, 4, 6
# A logit is named by its row and column.
NAMES = torch.arange(BATCH * N_POS).view(BATCH, N_POS, 1) * 100 + torch.arange(D_VOCAB)
MASK = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)


def indexed(*index):
    return all_logits(BATCH, N_POS, D_VOCAB).indexed(operator.getitem, index)


def named(at):
    return at.rows * 100 + at.columns


def asked(at):
    columns = at.ask.columns
    return at.ask.rows.tolist(), None if columns is None else columns.tolist()


@pytest.mark.parametrize(
    ("index", "rows", "columns", "is_copy", "is_settled"),
    [
        ((), list(range(12)), None, False, False),
        ((0, -1, 5), [3], [5], False, True),
        ((slice(None), -1), [3, 7, 11], None, False, False),
        ((1, slice(1, None, 2), slice(4)), [5, 7], [0, 1, 2, 3], False, False),
        ((slice(None), -1, 2), [3, 7, 11], [2], False, False),
        ((slice(None), -1, [5, 0, 5]), [3, 7, 11], [0, 5], True, False),
        ((torch.arange(3), -1, torch.tensor([5, 0, 5])), [3, 7, 11], [0, 5], True, True),
        ((MASK,), [0, 3, 9, 10], None, True, False),
        ((MASK, 1), [0, 3, 9, 10], [1], True, False),
        (([2, 0],), [0, 1, 2, 3, 8, 9, 10, 11], None, True, False),
        ((0, 0, torch.arange(6)), [0], None, True, False),
        ((0, 0, torch.arange(5, -1, -1)), [0], None, True, False),
        ((0, [0, 1], [[2], [3]]), [0, 1], [2, 3], True, False),
        ((0, [0, 1], [2, 3]), [0, 1], [2, 3], True, True),
        ((0, [[0], [1]], [2, 3]), [0, 1], [2, 3], True, False),
        ((NAMES % 500 == 3,), [0, 5, 10], [3], True, True),
        ((True,), list(range(12)), None, True, True),
        ((None, 2, None, 3), [11], None, False, False),
    ],
)
def test_what_an_index_names(index, rows, columns, is_copy, is_settled):
    at = indexed(*index)
    expected = NAMES[index]
    assert torch.equal(named(at), expected)
    assert at.shape == expected.shape
    assert asked(at) == (rows, columns)
    assert (at.is_copy, at.is_settled) == (is_copy, is_settled)
    # From the block of these rows and columns, what the index names.
    block = NAMES.flatten(0, 1)[at.ask.rows]
    block = block if columns is None else block[:, at.ask.columns]
    assert torch.equal(at.ask.arranged(block).reshape(at.shape), expected)


@pytest.mark.parametrize("index", [(slice(2, 2),), (0, 0, slice(5, 5)), ([],), (MASK & False,)])
def test_an_index_may_name_nothing(index):
    at = indexed(*index)
    assert at.is_settled and at.shape == NAMES[index].shape


def test_views_and_choices():
    whole = all_logits(BATCH, N_POS, D_VOCAB)
    at = whole.viewed(Tensor.select, 1, -1)
    assert torch.equal(named(at), NAMES[:, -1]) and not at.is_copy
    at = at.viewed(Tensor.unsqueeze, dim=0)
    assert at.shape == (1, 3, 6) and asked(at) == ([3, 7, 11], None)
    at = whole.selected(Tensor.index_select, -1, torch.tensor([5, 5]))
    assert torch.equal(named(at), NAMES[..., [5, 5]]) and at.is_copy and asked(at)[1] == [5]
    ids = torch.tensor([[[4], [0]]])
    at = whole.gathered(torch.gather, 2, ids)
    assert torch.equal(named(at), NAMES.gather(2, ids)) and asked(at) == ([0, 1], [0, 4])
    with pytest.raises(IndexError, match="Dimension out of range"):
        whole.selected(Tensor.index_select, 3, torch.tensor([0]))


@pytest.mark.parametrize(
    ("index", "shape"),
    [
        ((slice(None), -1), (512, 256_000)),
        ((torch.ones(512, 2048, dtype=torch.bool),), (512 * 2048, 256_000)),
        ((torch.arange(512), -1), (512, 256_000)),
        ((torch.arange(512), torch.tensor(-1)), (512, 256_000)),
        ((..., torch.arange(256_000)), (512, 2048, 256_000)),
        ((..., slice(10)), (512, 2048, 10)),
        ((slice(None), [3, 5]), (512, 2, 256_000)),
        ((None, ..., None), (1, 512, 2048, 256_000, 1)),
        ((torch.arange(512)[:, None], slice(None), [[0, 1]]), (512, 2, 2048)),
    ],
)
def test_nothing_of_the_size_of_the_logits_is_made(index, shape):
    """Ids of all of these logits would take two terabytes."""
    at = all_logits(512, 2048, 256_000).indexed(operator.getitem, index)
    at = at.viewed(Tensor.unsqueeze, 0)
    assert at.shape == (1, *shape)
    for ids in (at.rows, at.columns):
        assert ids.untyped_storage().nbytes() <= 8 * 512 * 2048


def kept(whole, *index):
    return whole.kept(LogitIndex.indexed, operator.getitem, (index,), {})


def test_an_index_is_known_by_its_content():
    whole = all_logits(2, 5, 7)
    assert kept(whole, 0, -1) is kept(whole, 0, -1) is not kept(whole, 0, 1)
    assert whole is all_logits(2, 5, 7) is not all_logits(2, 5, 8)
    ids = torch.tensor([0, 1])
    at = kept(whole, ids, -1, [3, 4])
    assert at is kept(whole, ids.clone(), -1, [3, 4]) is not kept(whole, ids, -1, (3, 4))
    ids[0] = 1
    assert kept(whole, ids, -1, [3, 4]) is not at
    at = whole.kept(LogitIndex.viewed, Tensor.select, (0, 1), {})
    assert at is whole.kept(LogitIndex.viewed, Tensor.select, (0, 1), {})
    assert at is not whole.kept(LogitIndex.viewed, Tensor.select, (), {"dim": 0, "index": 1})
    # What is not known by its content is worked out anew.
    for odd in (np.int64(1), True, slice(np.int64(1))):
        assert kept(whole, odd) is not kept(whole, odd)


def test_many_indices_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(logit_index, "_KEPT", 10)
    whole = all_logits(2, 5, 9)
    for pos in range(5):
        for stop in range(9):
            kept(whole, 0, pos, slice(stop))
            assert len(whole._kept) <= 10
    whole._kept.clear()
    ids = torch.zeros(3000, dtype=torch.int64)
    kept(whole, ids, 0)
    kept(whole, slice(None), 0, ids)
    assert len(whole._kept) == 2
    # Much of an index, or much that it names.
    kept(whole, torch.zeros(5000, dtype=torch.int64), 0, 0)
    kept(whole, ids)
    assert len(whole._kept) == 2


def test_what_is_kept_is_of_no_inference_mode():
    whole = all_logits(2, 5, 11)
    with torch.inference_mode():
        at = kept(whole, [1, 0, 1])
        assert not any(one.is_inference() for one in (at.rows, at.columns))
        ask = at.ask
        assert not any(one.is_inference() for one in (ask.rows, ask.row_at))
    assert at.ask is ask
