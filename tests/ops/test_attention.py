"""The public attention ops: the same as the specification, registered, and never a square mask."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlens.errors import ShapeError
from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.ops import attention as module
from fastlens.ops.attention import attention, attention_with_lse
from tests.close import assert_close_to
from tests.kernels.attention_cases import RULES, biases, padding, qkv


def test_attention_equals_the_specification():
    q, k, v = torch.randn(3, 2, 6, 4, 8).unbind(0)
    rule = AttentionRule(2.0)
    truth = reference.attention(q.double(), k.double(), v.double(), rule)
    assert_close_to(attention(q, k, v, rule), truth, atol=1e-6)


@pytest.mark.parametrize("rule", ["causal", "window"])
def test_values_may_be_narrower_than_keys(rule):
    q, k, v = (x.requires_grad_() for x in qkv(9, 9, 2, torch.float64, d_head=8))
    narrow = v[..., :5]
    want = attention(q, k, v, RULES[rule])[..., :5]
    z, lse = attention_with_lse(q, k, narrow, RULES[rule])
    assert z.shape[-1] == 5 and torch.equal(z, want)
    assert torch.equal(lse, attention_with_lse(q, k, v, RULES[rule])[1])
    assert torch.equal(attention(q, k, narrow, RULES[rule]), want)
    inputs = (q, k, v)
    of_narrow = torch.autograd.grad(attention(q, k, narrow, RULES[rule]).pow(2).sum(), inputs)
    for found, expected in zip(
        of_narrow, torch.autograd.grad(want.pow(2).sum(), inputs), strict=True
    ):
        assert_close_to(found, expected, atol=1e-12)
    with pytest.raises(ShapeError, match="each key needs its value"):
        attention(q, k, torch.cat([v, v], -1), RULES[rule])


@pytest.mark.parametrize("n", [1, 63, 129, 1000])
@pytest.mark.parametrize("rule", ["causal", "window", "alibi"])
def test_odd_lengths(n, rule):
    q, k, v = qkv(n, n, 2, torch.float32, d_head=16)
    z, lse = attention_with_lse(q, k, v, RULES[rule])
    truth = reference.attention_lse(q.double(), k.double(), v.double(), RULES[rule])
    assert_close_to(z, truth[0], atol=4e-6)
    assert_close_to(lse, truth[1], atol=4e-6)
    assert_close_to(attention(q, k, v, RULES[rule]), truth[0], atol=4e-6)


def test_long_rows_with_a_mask_hold_no_square_mask():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out))
            return out

    n = 1100
    q, k, v = torch.randn(3, 1, n, 1, 4).unbind(0)
    mask = torch.ones(1, n, dtype=torch.bool)
    mask[0, :3] = False
    bias = torch.zeros(1, 1, 1, n).expand(-1, -1, n, -1)
    for attend in (attention, attention_with_lse):
        with Watch():
            attend(q, k, v, AttentionRule(2.0), 0, mask)
        assert max(seen) <= 512 * n
        seen.clear()
        with Watch():
            attend(q, k, v, AttentionRule(2.0), 0, mask, bias)
        # A slice of the bias, a view, is as large as the bias is said to be.
        assert max(seen) <= n * n and len([size for size in seen if size > 512 * n]) <= 4
        seen.clear()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("mask", [None, padding(9)], ids=["", "masked"])
def test_key_lengths_hide_the_keys_behind_them(rule, mask):
    q, k, v = qkv(9, 9, 2)
    lengths = torch.tensor([8, 0])
    counted = torch.arange(9) < lengths[:, None]
    counted = counted if mask is None else counted & mask
    truth = reference.attention_lse(q, k, v, rule, 0, counted)
    z, lse = attention_with_lse(q, k, v, rule, key_mask=mask, key_lengths=lengths)
    assert_close_to(z, truth[0], atol=1e-12)
    assert_close_to(lse, truth[1], atol=1e-12)
    assert_close_to(attention(q, k, v, rule, key_mask=mask, key_lengths=lengths), z, atol=1e-12)
    assert not z[1].any() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("offset", [0, 3])
def test_rows_without_keys_are_zeros_without_a_gradient(rule, offset):
    q, k, v = (x.requires_grad_() for x in qkv(6, 6 + offset, 2))
    mask = torch.ones(2, 6 + offset, dtype=torch.bool)
    mask[0] = False
    z, lse = attention_with_lse(q, k, v, rule, offset, mask)
    assert not z[0].any() and (lse[0] == -torch.inf).all() and lse[1].isfinite().all()
    assert not lse.requires_grad
    for grad in torch.autograd.grad(z.sum(), (q, k, v)):
        assert not grad[0].any() and grad.isfinite().all() and grad[1].any()


def test_disjoint_keys_are_merged_by_their_log_sum_exps():
    q, k, v = qkv(4, 9, 2)
    rule = AttentionRule(2.0, causal=False)
    whole, lse = attention_with_lse(q, k, v, rule)
    parts = [
        attention_with_lse(q, k[:, keys], v[:, keys], rule) for keys in (slice(5), slice(5, 9))
    ]
    weights = [torch.exp(one - lse).transpose(1, 2)[..., None] for _, one in parts]
    merged = sum(z * weight for (z, _), weight in zip(parts, weights, strict=True))
    assert_close_to(merged, whole, atol=1e-12)


def test_heads_that_do_not_fit_are_refused():
    q, k, v = qkv(3, 3, 4)
    for attend in (attention, attention_with_lse):
        with pytest.raises(ShapeError, match="4 query heads cannot share 3 KV heads"):
            attend(q, k[:, :, :3], v[:, :, :3], AttentionRule(1.0))


# -- the registered op -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["causal", "everything"])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("bias", ["none", "of heads"])
def test_opcheck(rule, needs_grad, bias):
    inputs = [x.float().requires_grad_(needs_grad) for x in qkv(5, 7, 2)]
    bias = biases(5, 7)[bias]
    bias = None if bias is None else bias.float().requires_grad_(needs_grad)
    mask = padding(7)
    arguments = (*inputs, *RULES[rule], 2, mask, bias)
    torch.library.opcheck(torch.ops.fastlens.attention.default, arguments)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradients_of_the_registered_op(rule):
    bias = biases(5, 7)["of heads"]
    leaves = [x.requires_grad_() for x in (*qkv(5, 7, 2), bias)]

    def run(q, k, v, bias):
        return torch.ops.fastlens.attention(q, k, v, *rule, 2, padding(7), bias)[0]

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_a_kernel_torch_cannot_look_into_goes_through_the_registered_op(monkeypatch):
    monkeypatch.setattr(module, "is_opaque", lambda *place: True)
    q, k, v = (x.requires_grad_() for x in qkv(5, 7, 2))
    bias = biases(5, 7)["of heads"].requires_grad_()
    rest = AttentionRule(2.0, window=3), 2, padding(7), bias
    z = attention(q, k, v, *rest)
    assert "fastlens" in type(z.grad_fn).__name__.lower()
    assert torch.equal(z, attention_with_lse(q, k, v, *rest)[0])
    truth = reference.attention(q, k, v, *rest)
    assert_close_to(z, truth, atol=1e-12)
    found, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v, bias)) for x in (z, truth))
    for got, want in zip(found, wanted, strict=True):
        assert_close_to(got, want, atol=1e-12)


def test_a_fake_gpu_needs_no_gpu():
    with FakeTensorMode():
        q = torch.empty(2, 5, 4, 8, device="cuda", dtype=torch.bfloat16)
        z, lse = torch.ops.fastlens.attention(q, q, q, *AttentionRule(1.0), 0, None, None)
    assert (z.device.type, z.shape, z.dtype) == ("cuda", q.shape, q.dtype)
    assert (lse.device.type, lse.shape, lse.dtype) == ("cuda", (2, 4, 5), torch.float32)


def test_traced_whole():
    q, k, v = (x.float() for x in qkv(5, 5, 2))

    def run(q, k, v):
        return torch.ops.fastlens.attention(q, k, v, *AttentionRule(2.0), 0, None, None)

    traced = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, traced(q, k, v), run(q, k, v)))
