"""Patterns of chosen heads and rows: what the whole pattern has there, and no more memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlens.errors import GradientError, ShapeError, SiteError
from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.ops import attention_pattern as module
from fastlens.ops.attention import attention, attention_with_lse
from fastlens.ops.attention_pattern import (
    attention_pattern,
    attention_pattern_rows,
    attention_with_pattern,
)
from tests.close import assert_close_to, assert_no_worse
from tests.kernels.attention_cases import RULES, biases, padding, qkv

SITES = torch.tensor([[0, 3, 4], [1, 0, 0], [0, 3, 4], [1, 2, 2], [0, 0, 1]])
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def whole(q, k, rule, offset=0, mask=None, bias=None, scores=False):
    found = reference.attention_scores(q, k, rule, offset, mask, bias)
    return found if scores else reference.pattern_of(found)


# -- what is chosen --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "rows"),
    [
        (None, None),
        ([-1], [-2, 1]),
        (torch.tensor([2, 0]), torch.tensor([4])),
        ((3, 3), range(1, 5, 2)),
        (range(1, 3), range(2, 2)),
        ([], None),
    ],
    ids=str,
)
def test_heads_and_rows_in_the_order_wanted(heads, rows):
    q, k, _ = qkv(5, 7, 2)
    rule, mask = AttentionRule(2.0), padding(7)
    truth = whole(q, k, rule, 2, mask)
    truth = truth if heads is None else truth[:, torch.as_tensor(heads).long()]
    truth = truth if rows is None else truth[:, :, torch.as_tensor(rows).long()]
    found = attention_pattern(q, k, rule, heads, rows, 2, mask)
    assert_close_to(found, truth, atol=1e-12)


@pytest.mark.parametrize("n", [1, 63, 129, 1000])
@pytest.mark.parametrize("rule", ["causal", "window", "everything"])
def test_odd_lengths(n, rule):
    q, k, v = qkv(n, n, 2, torch.float32, d_head=16)
    _, lse = attention_with_lse(q, k, v, RULES[rule])
    eager, truth = (
        whole(x, y, RULES[rule])[:, [3, 0]] for x, y in ((q, k), (q.double(), k.double()))
    )
    for given_lse in (None, lse):
        found = attention_pattern(q, k, RULES[rule], [3, 0], lse=given_lse)
        # A log-sum-exp of float32 has an error of its own.
        step = None if given_lse is None else 4e-7 * max(1.0, float(lse.abs().max()))
        assert_no_worse(found, eager, truth, floor=step)


@given(st.data())
@settings(max_examples=60)
def test_rows_sum_to_one_or_to_nothing(data):
    draw = data.draw
    n_queries, n_keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rule = AttentionRule(
        draw(st.floats(0.1, 9.0)),
        draw(st.booleans()),
        draw(st.none() | st.integers(1, 9)),
        draw(st.sampled_from([-1.0, 3.0])),
        draw(st.booleans()),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    q, k, v = qkv(n_queries, n_keys, draw(st.sampled_from([1, 2, 4])), dtype)
    offset = draw(st.integers(0, 5))
    mask = draw(st.none() | st.just(torch.rand(2, n_keys) < 0.6))
    bias = draw(st.sampled_from(list(biases(n_queries, n_keys).values())))
    rest = offset, mask, bias
    pattern = attention_pattern(q, k, rule, None, None, *rest)
    assert pattern.dtype == dtype and bool((pattern >= 0).all())
    sums, sees = pattern.double().sum(-1), whole(q, k, rule, *rest, scores=True) > -torch.inf
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert_close_to(sums, sees.any(-1).double(), atol=tolerance)
    # Nothing on a key that is hidden; and by the log-sum-exp the same.
    assert not pattern[~sees].any()
    lse = attention_with_lse(q, k, v, rule, *rest)[1]
    again = attention_pattern(q, k, rule, None, None, *rest, lse)
    assert_close_to(again, pattern, atol=tolerance)
    mixed = attention_with_pattern(
        attention_pattern(q.double(), k.double(), rule, None, None, *rest), v.double()
    )
    assert_close_to(attention(q.double(), k.double(), v.double(), rule, *rest), mixed, atol=1e-9)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_one_head_takes_the_memory_of_one_head(needs_grad):
    """Of what is made, one tensor is as large as the head's pattern, and the others are blocks."""
    n, seen = 2048, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                    seen.append(x.untyped_storage().nbytes())
            return out

    q, k = (torch.randn(1, n, heads, 4, requires_grad=needs_grad) for heads in (8, 2))
    with Watch():
        pattern = attention_pattern(q, k, AttentionRule(2.0), [5])
        assert max(seen) == 4 * n * n and sum(size >= 2 * n * n for size in seen) == 1
        rows = attention_pattern(q, k, AttentionRule(2.0), None, [7])
        seen.clear()
        if needs_grad:
            pattern.backward(pattern.detach())
            assert sum(size >= 2 * n * n for size in seen) == 0
    assert rows.shape == (1, 8, 1, n) and pattern.shape == (1, 1, n, n)


# -- gradients -------------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("uses_lse", [False, True])
def test_gradients(rule, uses_lse):
    q, k, v = (x.requires_grad_() for x in qkv(5, 7, 2))
    bias = biases(5, 7)["of heads"].requires_grad_()

    def run(q, k, bias):
        lse = None
        if uses_lse:
            lse = attention_with_lse(q, k, v, rule, 2, None, bias)[1]
        return attention_pattern(q, k, rule, [3, 0, 3], [4, 1], 2, None, bias, lse)

    assert torch.autograd.gradcheck(run, (q, k, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (q, k, bias), fast_mode=True)


def test_a_row_without_keys_has_no_gradient():
    q, k, _ = (x.requires_grad_() for x in qkv(4, 4, 2))
    mask = torch.tensor([[False] * 4, [True] * 4])
    pattern = attention_pattern(q, k, AttentionRule(2.0), [1], None, 0, mask)
    rows = attention_pattern_rows(q, k, AttentionRule(2.0), SITES[:1] % 4, 0, mask)
    assert not pattern[0].any() and not rows.any()
    for grad in torch.autograd.grad(pattern.square().sum() + rows.sum(), (q, k)):
        assert grad.isfinite().all() and not grad[0].any() and grad[1].any()


def test_under_the_transforms_of_torch_func():
    q, k = (torch.randn(3, 1, 5, 4, 8, dtype=torch.float64) for _ in range(2))

    def spread(q, k):
        return (
            module.kernel_for("attention_pattern", "cpu", q.dtype)(q, k, AttentionRule(2.0), (1,))
            .square()
            .sum()
        )

    gradients = torch.func.vmap(torch.func.grad(spread))(q, k)
    one = q[1].clone().requires_grad_()
    assert_close_to(gradients[1], torch.autograd.grad(spread(one, k[1]), one)[0], atol=1e-12)


# -- single rows -----------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("scores", [False, True])
def test_single_rows_are_those_of_the_whole(rule, scores):
    q, k, v = (x.requires_grad_() for x in qkv(5, 7, 2))
    mask, bias = padding(7), biases(5, 7)["of keys"]
    lse = attention_with_lse(q, k, v, rule, 2, mask, bias)[1]
    truth = whole(q, k, rule, 2, mask, bias, scores)[tuple(SITES.T)]
    for given_lse in (None, lse):
        found = attention_pattern_rows(q, k, rule, SITES, 2, mask, given_lse, scores, bias)
        assert_close_to(found, truth, atol=1e-12)
        seen = truth > -torch.inf
        pairs = [
            torch.autograd.grad(x.masked_fill(~seen, 0.0).square().sum(), (q, k), retain_graph=True)
            for x in (found, truth)
        ]
        for got, want in zip(*pairs, strict=True):
            assert_close_to(got, want, atol=1e-12)


@each_rule
@pytest.mark.parametrize("scores", [False, True])
def test_gradients_of_single_rows(rule, scores):
    q, k, _ = (x.requires_grad_() for x in qkv(5, 7, 2))

    def run(q, k):
        found = attention_pattern_rows(q, k, rule, SITES, 2, None, None, scores)
        return found.masked_fill(found == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, (q, k), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (q, k), fast_mode=True)


def test_single_rows_that_are_refused():
    q, k, _ = qkv(5, 7, 2)
    for site in ([0, 4, 0], [2, 0, 0], [0, 0, 5], [0, -1, 0]):
        with pytest.raises(SiteError, match="site 1 of the table"):
            attention_pattern_rows(q, k, AttentionRule(1.0), torch.tensor([[0, 0, 0], site]))
    with pytest.raises(GradientError, match="passes no gradient to bias"):
        bias = biases(5, 7)["of heads"].requires_grad_()
        attention_pattern_rows(q, k, AttentionRule(1.0), SITES, bias=bias)


# -- a given pattern -------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("heads", [[1], [3, 0], [2, 3]], ids=str)
def test_heads_find_their_own_values(kv_heads, heads):
    q, k, v = qkv(5, 7, kv_heads)
    z = attention(q, k, v, AttentionRule(2.0), 2)
    pattern = attention_pattern(q, k, AttentionRule(2.0), heads, None, 2)
    found = attention_with_pattern(pattern, v, heads, n_heads=4)
    assert_close_to(found, z[:, :, heads], atol=1e-12)


def test_a_given_pattern_is_not_normalised():
    v = torch.arange(6.0).view(1, 3, 2, 1)
    pattern = torch.tensor([2.0, 0.0, -1.0]).view(1, 1, 1, 3).expand(1, 2, 1, 3)
    assert attention_with_pattern(pattern, v).flatten().tolist() == [-4.0, -3.0]


def test_a_given_pattern_that_is_refused():
    pattern, v = torch.rand(1, 1, 3, 5), torch.rand(1, 5, 2, 4)
    with pytest.raises(ShapeError, match="needs n_heads"):
        attention_with_pattern(pattern, v, [1])
    with pytest.raises(ShapeError, match="head 4 was asked for, and there are 4"):
        attention_with_pattern(pattern, v, [4], 4)
    with pytest.raises(ShapeError, match="2 heads were named for a pattern of 1"):
        attention_with_pattern(pattern, v, [0, 1], 4)
    with pytest.raises(ShapeError, match="1 query heads cannot share 2"):
        attention_with_pattern(pattern, v)


def test_indices_outside_are_refused():
    q, k, _ = qkv(5, 7, 2)
    with pytest.raises(ShapeError, match="head 4 was asked for, and there are 4"):
        attention_pattern(q, k, AttentionRule(1.0), [0, 4])
    with pytest.raises(ShapeError, match="query row -6 was asked for, and there are 5"):
        attention_pattern(q, k, AttentionRule(1.0), None, [-6])
    with pytest.raises(ShapeError, match="query row 5 was asked for"):
        attention_pattern(q, k, AttentionRule(1.0), None, range(3, 6))
    with pytest.raises(ShapeError, match="4 query heads cannot share 3"):
        attention_pattern(q, torch.randn(2, 7, 3, 8).double(), AttentionRule(1.0))


# -- the registered ops ----------------------------------------------------------------------------


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("scores", [False, True])
def test_opcheck_of_rows(needs_grad, scores):
    q, k, v = (x.float().requires_grad_(needs_grad) for x in qkv(5, 7, 2))
    rule = AttentionRule(2.0, soft_cap=3.0)
    lse = attention_with_lse(q, k, v, rule, 2)[1]
    arguments = (q, k, SITES, *rule, 2, None, lse, scores, None)
    torch.library.opcheck(torch.ops.fastlens.attention_pattern_rows.default, arguments)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("heads", [None, [3, 0]])
def test_opcheck_of_a_given_pattern(needs_grad, heads):
    pattern = torch.rand(2, 4 if heads is None else 2, 3, 5).requires_grad_(needs_grad)
    v = torch.randn(2, 5, 2, 8).requires_grad_(needs_grad)
    arguments = (pattern, v, heads, None if heads is None else 4)
    torch.library.opcheck(torch.ops.fastlens.attention_with_pattern.default, arguments)
    found = torch.ops.fastlens.attention_with_pattern(*arguments)
    assert torch.equal(found, attention_with_pattern(*arguments))


def test_a_kernel_torch_cannot_look_into_goes_through_the_registered_op(monkeypatch):
    monkeypatch.setattr(module, "is_opaque", lambda *place: True)
    pattern, v = torch.rand(2, 4, 3, 5, requires_grad=True), torch.randn(2, 5, 2, 8)
    z = attention_with_pattern(pattern, v)
    assert "fastlens" in type(z.grad_fn).__name__.lower()
    (grad,) = torch.autograd.grad(z.sum(), pattern)
    assert_close_to(
        grad, v.sum(-1).repeat_interleave(2, 2).transpose(1, 2)[:, :, None].expand(-1, -1, 3, -1)
    )


def test_a_fake_gpu_needs_no_gpu():
    with FakeTensorMode():
        q = torch.empty(2, 5, 4, 8, device="cuda", dtype=torch.bfloat16)
        rows = attention_pattern_rows(q, q, AttentionRule(1.0), torch.zeros(3, 3).long())
        z = torch.ops.fastlens.attention_with_pattern(
            torch.empty(2, 1, 6, 5, device="cuda"), q, [3], 4
        )
    assert (rows.device.type, rows.shape, rows.dtype) == ("cuda", (3, 5), torch.float32)
    assert (z.device.type, z.shape, z.dtype) == ("cuda", (2, 6, 1, 8), torch.bfloat16)
