"""The public op: what it means, what it refuses, and how compilers see it."""

import inspect

import pytest
import torch

from fastlens.errors import GradientError, ShapeError
from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.ops import dispatch
from fastlens.ops.suffix_attention import Span, suffix_attention
from tests.close import assert_close_to

RULES = {
    "causal": AttentionRule(2.0),
    "bidirectional": AttentionRule(2.0, causal=False),
    "window": AttentionRule(2.0, window=3, soft_cap=1.0),
    "alibi": AttentionRule(2.0, alibi=True),
}
TABLE = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 6]])
SPANS = [Span(torch.tensor([0, 1]), 2, 4), Span(torch.tensor([2]), 3, 4)]

each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def qkv(dtype=torch.float64, n_rows=7):
    return [torch.randn(n_rows, heads, 8, dtype=dtype) for heads in (4, 2, 2)]


def as_op(rule, q, k, v, mask=None, table=TABLE, spans=SPANS):
    branches, starts, stops = zip(*spans, strict=True)
    return q, k, v, table, list(branches), list(starts), list(stops), mask, *rule


@each_rule
@pytest.mark.parametrize("is_masked", [False, True])
def test_it_is_its_specification(rule, is_masked):
    q, k, v = qkv()
    mask = torch.ones_like(TABLE, dtype=torch.bool) if is_masked else None
    if mask is not None:
        mask[1, :1] = False
    z = suffix_attention(q, k, v, TABLE, SPANS, rule, mask)
    truth = reference.suffix_attention(q, k, v, TABLE, SPANS, rule, mask)
    assert z.shape == (5, 4, 8)
    assert_close_to(z, truth, atol=1e-13)
    assert torch.equal(torch.ops.fastlens.suffix_attention(*as_op(rule, q, k, v, mask)), z)


@each_rule
def test_values_may_be_narrower_than_keys(rule):
    q, k, v = qkv()
    want = suffix_attention(q, k, v, TABLE, SPANS, rule)[..., :3]
    assert torch.equal(suffix_attention(q, k, v[..., :3], TABLE, SPANS, rule), want)


@each_rule
def test_opcheck(rule):
    arguments = as_op(rule, *qkv(torch.float32), torch.ones_like(TABLE, dtype=torch.bool))
    torch.library.opcheck(torch.ops.fastlens.suffix_attention.default, arguments)


def test_an_opaque_kernel_is_called_through_the_registered_op(monkeypatch):
    key = "suffix_attention", "cpu", torch.float64
    dispatch.kernel_for(*key)
    monkeypatch.setattr(dispatch, "_OPAQUE", {key})
    seen = []

    def kernel(q, k, v, table, spans, rule, key_mask):
        seen.append((spans, rule, key_mask))
        return reference.suffix_attention(q, k, v, table, spans, rule, key_mask)

    monkeypatch.setitem(dispatch._CHOSEN, key, kernel)
    q, k, v = qkv()
    rule = RULES["window"]
    z = suffix_attention(q, k, v, TABLE, SPANS, rule)
    assert torch.equal(z, reference.suffix_attention(q, k, v, TABLE, SPANS, rule))
    ((spans, given, mask),) = seen
    assert given == rule and mask is None
    assert [(s.branches.tolist(), s.start, s.stop) for s in spans] == [([0, 1], 2, 4), ([2], 3, 4)]


def test_a_fake_gpu_needs_no_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(7, heads, 8, device="cuda") for heads in (4, 2, 2))
        table = torch.empty(3, 4, dtype=torch.long, device="cuda")
        spans = [Span(torch.empty(2, dtype=torch.long, device="cuda"), 1, 4)]
        arguments = as_op(RULES["causal"], q, k, v, table=table, spans=spans)
        z = torch.ops.fastlens.suffix_attention(*arguments)
    assert (z.device.type, z.shape) == ("cuda", (6, 4, 8))


def test_a_gradient_is_refused():
    q, k, v = qkv()
    v.requires_grad_()
    with pytest.raises(GradientError, match="passes no gradient on"):
        suffix_attention(q, k, v, TABLE, SPANS, RULES["causal"])
    with pytest.raises(GradientError, match="passes no gradient on"):
        torch.ops.fastlens.suffix_attention(*as_op(RULES["causal"], q, k, v))
    with torch.no_grad():
        z = suffix_attention(q, k, v, TABLE, SPANS, RULES["causal"])
    assert not z.requires_grad


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"v": torch.zeros(7, 1, 8)}, "the same rows"),
        ({"q": torch.zeros(6, 4, 8)}, "the same rows"),
        ({"q": torch.zeros(7, 4, 4)}, "the same rows"),
        ({"q": torch.zeros(7, 3, 8)}, "3 query heads cannot share 2"),
        ({"k": torch.zeros(7, 0, 8), "v": torch.zeros(7, 0, 8)}, "cannot share 0 KV heads"),
        ({"q": torch.zeros(7, 4, 8, dtype=torch.long)}, "floating-point.*int64"),
        ({"rule": AttentionRule(2.0, window=0)}, "window=0"),
        ({"table": TABLE.float()}, r"integers; got torch.float32 \[3, 4\]"),
        ({"table": TABLE[0]}, r"integers; got torch.int64 \[4\]"),
        ({"key_mask": torch.ones(3, 4, dtype=torch.long)}, "boolean.*int64"),
        ({"spans": [Span(torch.tensor([0, -1]), 2, 4)]}, "branch -1, and the table has 3"),
        ({"spans": [Span(torch.tensor([3]), 2, 4)]}, "branch 3, and the table has 3"),
        ({"key_mask": torch.ones(3, 5, dtype=torch.bool)}, r"got \[3, 5\]"),
        ({"spans": [Span(torch.tensor([0]), 2, 2)]}, "from position 2 up to 2"),
        ({"spans": [Span(torch.tensor([0]), 2, 5)]}, "has 4 positions"),
        ({"spans": [Span(torch.tensor([0]), -1, 3)]}, "from position -1"),
    ],
)
def test_what_does_not_fit_is_refused(change, sentence):
    # Called through, the checks of shapes that run only under pytest might speak first.
    q, k, v = qkv()
    given = {"q": q, "k": k, "v": v, "table": TABLE, "spans": SPANS, "rule": AttentionRule(2.0)}
    with pytest.raises(ShapeError, match=sentence):
        inspect.unwrap(suffix_attention)(**given | change)


def test_traced_whole():
    q, k, v = qkv()

    def run(q, k, v):
        return torch.ops.fastlens.suffix_attention(*as_op(RULES["causal"], q, k, v)) * 2

    traced = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(q, k, v), run(q, k, v))
