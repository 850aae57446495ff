"""What does not fit is refused in a sentence by every attention op; what fits passes as it is."""

import inspect

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastlens.errors import ShapeError
from fastlens.kernels.masks import AttentionRule
from fastlens.ops.attention import attention, attention_with_lse
from fastlens.ops.attention_inputs import check_branches, checked_mask, indices_of
from fastlens.ops.attention_pattern import (
    attention_pattern,
    attention_pattern_rows,
    attention_with_pattern,
)
from fastlens.ops.attention_summary import attention_summary

RULE = AttentionRule(2.0)
SITES = torch.tensor([[0, 0, 3]])
Q, K, V = torch.randn(3, 2, 4, 2, 3).unbind(0)


def as_users_call(op):
    """Without the checks of annotations, which run only under pytest and would speak first."""
    bare = inspect.unwrap(op)
    assert bare is not op
    return bare


# Each takes (q, k, v, rule) and what is given by name.
OPS = {
    "attention": as_users_call(attention),
    "attention_with_lse": as_users_call(attention_with_lse),
    "attention_pattern": lambda q, k, v, rule, **rest: as_users_call(attention_pattern)(
        q, k, rule, **rest
    ),
    "attention_pattern_rows": lambda q, k, v, rule, **rest: as_users_call(attention_pattern_rows)(
        q, k, rule, SITES, **rest
    ),
    "attention_summary": lambda q, k, v, rule, **rest: as_users_call(attention_summary)(
        q, k, rule, **rest
    ),
}
OF_ALL = {
    "another batch": ({"q": Q[:1]}, r"one batch and d_head; got \[1, 4, 2, 3\]"),
    "another d_head": ({"q": Q[..., :2]}, "one batch and d_head"),
    "no batch": ({"q": Q[0]}, "q is .batch, query_pos"),
    "no KV heads": ({"k": K[:, :, :0], "v": V[:, :, :0]}, "2 query heads cannot share 0 KV heads"),
    "integers": ({"q": Q.long(), "k": K.long(), "v": V.long()}, "floating-point.*int64"),
    "offset": ({"offset": -1}, "offset=-1 puts the first query before position 0"),
    "window": ({"rule": AttentionRule(2.0, window=0)}, "window=0 hides each query's own position"),
    "integer mask": ({"key_mask": torch.ones(2, 4).long()}, "boolean.*int64.*key_mask.bool"),
    "short mask": ({"key_mask": torch.ones(2, 3).bool()}, r"\[2, 4\].*got \[2, 3\]"),
    "mask of others": ({"key_mask": torch.ones(3, 4).bool()}, r"\[2, 4\].*got \[3, 4\]"),
    "short bias": ({"bias": torch.zeros(1, 1, 1, 4)}, r"\[2, 2, 4, 4\]; got \[1, 1, 1, 4\]"),
    "bias of others": ({"bias": torch.zeros(3, 2, 4, 4)}, r"got \[3, 2, 4, 4\]"),
    "boolean bias": ({"bias": torch.ones(1, 1, 4, 4).bool()}, "A mask of keys is key_mask"),
}
OF_SOME = [
    ("attention", {"v": V[:, :2]}, r"each key needs its value: k is \[2, 4, 2, 3\] and v \[2, 2"),
    ("attention", {"v": V[:, :1]}, "each key needs its value"),
    ("attention", {"key_lengths": torch.ones(3).long()}, r"2 examples; got torch.int64 \[3\]"),
    ("attention", {"key_lengths": torch.ones(2)}, "got torch.float32"),
    ("attention_with_lse", {"v": V[:, :2]}, "each key needs its value"),
    ("attention_with_lse", {"key_lengths": torch.ones(3).long()}, "one integer for each"),
    ("attention_pattern", {"lse": torch.zeros(2, 4, 2)}, r"\[2, 2, 4\]; got \[2, 4, 2\]"),
    ("attention_pattern", {"heads": torch.tensor([True, False])}, "head indices.*bool"),
    ("attention_pattern", {"heads": 0}, "head indices.*got 0. .*for one index a list"),
    ("attention_pattern", {"rows": [1.0]}, r"query row indices.*got \[1.0\]"),
    ("attention_pattern_rows", {"lse": torch.zeros(2, 4, 2)}, "attention_with_lse gave"),
    ("attention_summary", {"heads": [True]}, r"head indices.*got \[True\]"),
    ("attention_summary", {"top_k": -1}, "top_k=-1"),
]


def refused(op, change, sentence):
    given = {"q": Q, "k": K, "v": V, "rule": RULE} | change
    with pytest.raises(ShapeError, match=sentence):
        OPS[op](given.pop("q"), given.pop("k"), given.pop("v"), given.pop("rule"), **given)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", OF_ALL)
def test_what_does_not_fit_is_refused_by_each_op(op, case):
    refused(op, *OF_ALL[case])


@pytest.mark.parametrize(("op", "change", "sentence"), OF_SOME)
def test_what_does_not_fit_is_refused(op, change, sentence):
    refused(op, change, sentence)


@pytest.mark.parametrize(
    ("sites", "sentence"),
    [
        (torch.tensor([[0, 1, 0.7]]), "integers; got torch.float32"),
        (torch.tensor([[True, False, False]]), "integers; got torch.bool"),
        (torch.tensor([[0, 1]]), r"\(example, head, query row\); got \[1, 2\]"),
        (torch.tensor([0, 1, 2]), r"got torch.int64 \[3\]"),
    ],
)
def test_sites_that_are_no_sites_are_refused(sites, sentence):
    with pytest.raises(ShapeError, match=sentence):
        as_users_call(attention_pattern_rows)(Q, K, RULE, sites)


@pytest.mark.parametrize(
    ("pattern", "v", "rest", "sentence"),
    [
        (torch.ones(3, 2, 4, 4), V[:1], {}, r"one batch and as many keys; got \[3, 2, 4, 4\]"),
        (torch.ones(2, 2, 4, 3), V, {}, "as many keys"),
        (torch.ones(2, 4, 4), V, {}, "a pattern is .batch"),
        (torch.ones(2, 2, 4, 4), V.long(), {}, "floating-point"),
        (torch.ones(2, 2, 4, 4), V[:, :, :0], {}, "cannot share 0 KV heads"),
        (torch.ones(2, 1, 4, 4), V, {"heads": 0}, "heads 0 needs n_heads"),
        (torch.ones(2, 1, 4, 4), V, {"heads": [True], "n_heads": 2}, r"got \[True\]"),
        (torch.ones(2, 1, 4, 4), V, {"heads": [1.0], "n_heads": 2}, r"got \[1.0\]"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(pattern, v, rest, sentence):
    with pytest.raises(ShapeError, match=sentence):
        as_users_call(attention_with_pattern)(pattern, v, **rest)


@pytest.mark.parametrize("op", OPS)
def test_one_row_of_a_key_mask_stands_for_all_examples(op):
    row = torch.tensor([[True, False, True, True]])
    masks = row, row.expand(2, -1).clone(), None
    found, wanted, whole = (OPS[op](Q, K, V, RULE, key_mask=mask) for mask in masks)
    for some, same, other in zip(*map(tree_leaves, (found, wanted, whole)), strict=True):
        assert torch.equal(some, same)
        assert not some.numel() or not torch.equal(some, other)


def test_a_mask_that_fits_is_passed_as_it_is():
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert checked_mask(Q, K, V, RULE, 0, mask) is mask
    assert checked_mask(Q, K, None, RULE._replace(window=1), 3) is None


def test_checking_reads_no_tensor():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    rest = torch.ones(2, 4).bool(), torch.zeros(1, 1, 4, 4), torch.zeros(2, 2, 4)
    with Watch():
        checked_mask(Q, K, V, RULE, 0, *rest)
    assert not seen


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([True, False]),
        torch.tensor([1.0]),
        torch.tensor([[1]]),
        torch.tensor(1),
        [True, False],
        [torch.tensor(True)],
        np.array([True, False]),
        np.array([1.0]),
        [1.5],
        ["1"],
        1,
        None,
    ],
    ids=str,
)
def test_what_is_no_index_is_refused(indices):
    with pytest.raises(ShapeError, match="head indices are a sequence or a tensor of integers"):
        as_users_call(indices_of)(indices, 2, "head")


@pytest.mark.parametrize(
    ("indices", "wanted"),
    [
        ([1, -2], (1, 0)),
        (np.array([-1, 0]), (1, 0)),
        (torch.tensor([1, -1], dtype=torch.int32), (1, 1)),
        ([torch.tensor(1)], (1,)),
        (torch.tensor([]), ()),
        (range(-1, 1), (1, 0)),
        (range(2), range(2)),
    ],
    ids=str,
)
def test_indices_count_from_the_front(indices, wanted):
    assert as_users_call(indices_of)(indices, 2, "head") == wanted
    with pytest.raises(ShapeError, match="head 2 was asked for, and there are 2"):
        indices_of([2], 2, "head")


@pytest.mark.parametrize(
    ("branches", "sentence"),
    [
        (torch.tensor([0, -1]), "branch -1, and the table has 3"),
        (torch.tensor([0, 3]), "branch 3, and the table has 3"),
        (torch.tensor([True, False, True]), r"got torch.bool \[3\]"),
        (torch.tensor([0.0]), "got torch.float32"),
        (torch.tensor(0), r"got torch.int64 \[\]"),
        ([0], r"got \[0\]"),
    ],
    ids=str,
)
def test_branches_that_are_none_are_refused(branches, sentence):
    with pytest.raises(ShapeError, match=sentence):
        as_users_call(check_branches)(branches, 3)


def test_branches_of_a_gpu_are_not_read_back():
    from torch._subclasses.fake_tensor import FakeTensorMode

    check_branches(torch.tensor([2, 0]), 3)
    check_branches(torch.tensor([], dtype=torch.long), 0)
    with FakeTensorMode():
        check_branches(torch.full((2,), -1, device="cuda"), 3)
        check_branches(torch.full((2,), -1), 3)
