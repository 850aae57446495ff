"""Gradients made in blocks against those of the specification, in every dtype."""

import pytest
import torch

from fastlens.kernels import attention_gradients, reference, score_blocks
from tests.close import assert_no_worse
from tests.kernels.attention_cases import RULES, SIZES, added, qkv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
some_sizes = ["square", "continued", "unaligned", "beyond the keys"]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("size", [SIZES[name] for name in some_sizes], ids=some_sizes)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_attention(rule, size, dtype, monkeypatch):
    monkeypatch.setattr(score_blocks, "ROWS_PER_BLOCK", 4)
    n_queries, n_keys, offset, kv_heads = size
    weight = torch.linspace(-1, 1, 2 * n_queries * 4 * 8).view(2, n_queries, 4, 8)
    for mask, name, bias in added(n_queries, n_keys):
        inputs = qkv(n_queries, n_keys, kv_heads, dtype, strides="transposed")
        bias = None if bias is None else bias.to(dtype)

        def by_graph(dtype, inputs=inputs, bias=bias, mask=mask):
            leaves = [*inputs] if bias is None else [*inputs, bias]
            leaves = [x.to(dtype).detach().requires_grad_() for x in leaves]
            given = leaves[3] if bias is not None else None
            z = reference.attention(*leaves[:3], rule, offset, mask, given)
            return torch.autograd.grad((z * weight.to(dtype)).sum(), leaves)

        with torch.no_grad():
            found = attention_gradients.attention_gradients(
                *inputs, rule, offset, mask, bias, weight.to(dtype), bias is not None
            )
        truth, eager = by_graph(torch.float64), by_graph(dtype)
        given = [x for x in found if x is not None]
        for got, plain, want in zip(given, eager, truth, strict=True):
            floor = torch.finfo(dtype).eps * max(1.0, float(want.abs().max())) * 4
            assert_no_worse(got, plain, want, factor=3, floor=floor, name=f"bias {name}")


def test_a_bias_is_left_alone_unless_asked_for():
    q, k, v = qkv(5, 5, 2)
    bias = torch.zeros(1, 4, 5, 5)
    with torch.no_grad():
        found = attention_gradients.attention_gradients(
            q, k, v, RULES["causal"], 0, None, bias.double(), torch.ones_like(q)
        )
    assert found.bias is None and found.q is not None


def test_repeated_heads_and_rows_add_up():
    q, k, _ = qkv(5, 5, 2)
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    rest = RULES["causal"], [1, 1], [4, 4, 2], 0, None, bias
    pattern = reference.pattern_of(reference.attention_scores(q, k, rest[0], 0, None, bias))
    pattern = pattern[:, [1, 1]][:, :, [4, 4, 2]]
    grad = torch.ones_like(pattern).cumsum(-1)
    once = [RULES["causal"], [1], [4, 2], 0, None, bias]
    weights = torch.tensor([2.0, 1.0]).view(1, 1, 2, 1).double() * 2
    with torch.no_grad():
        twice = attention_gradients.pattern_gradients(q, k, *rest, pattern, grad, False, True)
        of_once = attention_gradients.pattern_gradients(
            q, k, *once, pattern[:, :1, 1:], grad[:, :1, 1:] * weights, False, True
        )
    for got, want in zip(twice, of_once, strict=True):
        assert torch.allclose(got, want, atol=1e-12)


def test_single_rows_in_pieces(monkeypatch):
    q, k, _ = (x.requires_grad_() for x in qkv(5, 7, 2))
    sites = torch.tensor([[0, 3, 4], [1, 0, 0], [0, 3, 4], [1, 2, 2]])
    rule = RULES["everything"]
    pattern = reference.attention_pattern_rows(q, k, rule, sites, 2)
    grad = torch.ones_like(pattern).cumsum(-1)
    truth = torch.autograd.grad(pattern, (q, k), grad)
    for size in (1, 2 * 7 * 8, 2**22):
        monkeypatch.setattr(attention_gradients, "GATHERED", size)
        with torch.no_grad():
            found = attention_gradients.row_gradients(
                q, k, rule, sites, 2, None, None, pattern, grad
            )
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found[:2], truth, strict=True))
