"""Every kernel of the attention ops that runs here against the specification in float64."""

import functools
import itertools

import pytest
import torch

from fastlens.kernels import (
    masks,
    reference,
    score_blocks,
    torch_attention,
    torch_attention_lse,
    torch_attention_pattern,
)
from fastlens.kernels.masks import AttentionRule, KeyGroup
from tests.close import assert_close_to, assert_no_worse
from tests.kernels.attention_cases import HEADS, RULES, SIZES, added, biases, padding, qkv
from tests.kernels.test_kernels import DTYPES, cpu_kernels, judge

each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
some_sizes = ["square", "unaligned", "beyond the keys"]
some_sizes = pytest.mark.parametrize("size", [SIZES[name] for name in some_sizes], ids=some_sizes)
LSE = torch_attention_lse.attention_lse


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of few rows, so that the larger sizes need several."""
    monkeypatch.setattr(torch_attention, "ROWS_PER_BLOCK", 4)
    monkeypatch.setattr(score_blocks, "ROWS_PER_BLOCK", 4)


def assert_as_good(found, eager, truth, dtype, **options):
    """In float64 plain PyTorch is the truth itself: a rounding step of its own then."""
    if dtype == torch.float64:
        assert_close_to(found, truth, atol=1e-12)
    else:
        assert_no_worse(found, eager, truth, **options)


# -- attention and its log-sum-exp -----------------------------------------------------------------


@pytest.mark.parametrize("op", ["attention", "attention_lse"])
@each_rule
@each_size
def test_values_and_gradients(op, rule, size, blocks):
    n_queries, n_keys, offset, kv_heads = size
    for kernel, (mask, name, bias) in itertools.product(cpu_kernels(op), added(n_queries, n_keys)):
        leaves = qkv(n_queries, n_keys, kv_heads)
        if name == "of heads":
            leaves.append(bias)

        def given(fn, *leaves, mask=mask, bias=bias):
            added = leaves[3] if len(leaves) > 3 else bias
            out = fn(*leaves[:3], rule, offset, mask, added)
            return out if isinstance(out, torch.Tensor) else out[0]

        found = _with_gradients(functools.partial(given, kernel.values[0].fn), leaves)
        truth = _with_gradients(functools.partial(given, reference.attention), leaves)
        for got, want in zip(found, truth, strict=True):
            assert_close_to(got, want, atol=1e-12, name=f"{name}, mask {mask is not None}")


def _with_gradients(fn, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    # Where no row sees a key, nothing was read.
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return out.detach(), *grads


@pytest.mark.parametrize("kernel", cpu_kernels("attention"))
@each_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", ["sliced", "transposed"])
def test_a_bias_in_every_dtype(kernel, rule, dtype, strides):
    inputs = qkv(9, 9, 2, dtype, strides=strides)
    bias = biases(9, 9)["of heads"].to(dtype)

    def given(fn):
        return lambda q, k, v, bias: fn(q, k, v, rule, 0, None, bias)

    judge(given(kernel.fn), given(reference.attention), [*inputs, bias])


@pytest.mark.parametrize("kernel", cpu_kernels("attention_lse"))
@each_rule
@some_sizes
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_log_sum_exp(kernel, rule, size, dtype, blocks):
    n_queries, n_keys, offset, kv_heads = size
    for number, (mask, _, bias) in enumerate(added(n_queries, n_keys)):
        strides = ["sliced", "transposed"][number % 2]
        inputs = qkv(n_queries, n_keys, kv_heads, dtype, strides=strides)
        rest = rule, offset, mask, bias
        z, lse = kernel.fn(*inputs, *rest)
        eager_z, eager_lse = reference.attention_lse(*inputs, *rest)
        true_z, true_lse = reference.attention_lse(*(x.double() for x in inputs), *rest)
        assert lse.dtype == torch.promote_types(torch.float32, dtype) and lse.is_contiguous()
        assert_as_good(z, eager_z, true_z, dtype)
        assert torch.equal(lse == -torch.inf, true_lse == -torch.inf)
        seeing = true_lse > -torch.inf
        of_seeing = (x[seeing] for x in (lse, eager_lse, true_lse))
        assert_as_good(*of_seeing, dtype, name="log-sum-exp")


@each_rule
def test_without_the_fused_cpu_kernel(rule, monkeypatch, blocks):
    monkeypatch.setattr(torch_attention_lse, "_FLASH", None)
    inputs, mask = qkv(9, 9, 2), padding(9)
    for bias in biases(9, 9).values():
        z, lse = LSE(*inputs, rule, 0, mask, bias)
        true_z, true_lse = reference.attention_lse(*inputs, rule, 0, mask, bias)
        assert_close_to(z, true_z, atol=1e-12)
        assert_close_to(lse, true_lse, atol=1e-12)


@pytest.mark.parametrize("empty", ["queries", "keys", "batch"])
@pytest.mark.parametrize("op", ["attention", "attention_lse"])
def test_nothing_to_attend_with_or_to(empty, op):
    q, k, v = qkv(3, 5, 2)
    if empty == "queries":
        q = q[:, :0]
    elif empty == "keys":
        k, v = k[:, :0], v[:, :0]
    else:
        q, k, v = q[:0], k[:0], v[:0]
    for kernel in cpu_kernels(op):
        for rule, mask in itertools.product(RULES.values(), (None, padding(5))):
            mask = mask if mask is None else mask[: len(q), : k.shape[1]]
            out = kernel.values[0].fn(q, k, v, rule, 2, mask)
            z, lse = out if isinstance(out, tuple) else (out, None)
            assert z.shape == q.shape and not z.any()
            assert lse is None or (lse.shape == (len(q), 4, q.shape[1]) and (lse < 0).all())


# -- patterns --------------------------------------------------------------------------------------

CHOICES = {
    "all": (None, None),
    "one of each": ([2], [0]),
    "a group": ([0, 1], range(1)),
    "mixed": ([3, 0, 2], [-1, 0, -1]),
    "twice": ((1, 1), None),
}


@pytest.mark.parametrize("kernel", cpu_kernels("attention_pattern"))
@each_rule
@some_sizes
@pytest.mark.parametrize("choice", CHOICES)
def test_patterns(kernel, rule, size, choice, blocks):
    n_queries, n_keys, offset, kv_heads = size
    q, k, v = qkv(n_queries, n_keys, kv_heads)
    heads, rows = CHOICES[choice]
    rows = rows if rows is None or isinstance(rows, range) else [r % n_queries for r in rows]
    for mask, name, bias in added(n_queries, n_keys):
        leaves = [q, k, bias] if name == "of heads" else [q, k]
        lse = reference.attention_lse(q, k, v, rule, offset, mask, bias)[1]

        def chosen(q, k, added=bias, mask=mask, *, scores=False):
            found = reference.attention_scores(q, k, rule, offset, mask, added)
            found = found if scores else reference.pattern_of(found)
            found = found if heads is None else found[:, list(heads)]
            return found if rows is None else found[:, :, list(rows)]

        for given, scores in ((None, False), (lse, False), (None, True)):

            def made(q, k, added=bias, mask=mask, given=given, scores=scores):
                rest = offset, mask, added, given, scores
                return kernel.fn(q, k, rule, heads, rows, *rest)

            truth = chosen(q, k, scores=scores)
            hidden = truth == -torch.inf
            assert torch.equal(made(q, k) == -torch.inf, hidden)
            found = _with_gradients(
                lambda *x, hidden=hidden, made=made: made(*x).masked_fill(hidden, 0.0), leaves
            )
            wanted = _with_gradients(
                lambda *x, hidden=hidden, scores=scores, chosen=chosen: chosen(
                    *x, scores=scores
                ).masked_fill(hidden, 0.0),
                leaves,
            )
            for got, want in zip(found, wanted, strict=True):
                assert_close_to(got, want, atol=1e-12, name=f"{name}, scores {scores}")


@pytest.mark.parametrize("kernel", cpu_kernels("attention_pattern"))
@each_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", [False, True])
def test_patterns_in_every_dtype(kernel, rule, dtype, scores):
    def spec(q, k):
        found = reference.attention_scores(q, k, rule, 0, padding(9))
        found = found if scores else reference.pattern_of(found)
        return found.masked_fill(found == -torch.inf, 0.0)

    def made(q, k):
        found = kernel.fn(q, k, rule, None, None, 0, padding(9), None, None, scores)
        return found.masked_fill(found == -torch.inf, 0.0)

    judge(made, spec, qkv(9, 9, 2, dtype, strides="transposed")[:2])


@pytest.mark.parametrize("kernel", cpu_kernels("attention_pattern_rows"))
@each_rule
@some_sizes
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_single_rows(kernel, rule, size, dtype):
    n_queries, n_keys, offset, kv_heads = size
    q, k, v = qkv(n_queries, n_keys, kv_heads, dtype, strides="transposed")
    sites = torch.randint(1000, (9, 3)) % torch.tensor([2, HEADS, n_queries])
    sites = torch.cat([sites, sites[:2]])
    wide = q.double(), k.double()
    for mask, _, bias in added(n_queries, n_keys):
        _, lse = LSE(q, k, v, rule, offset, mask, bias)
        for given, scores in ((None, False), (lse, False), (None, True)):
            rest = rule, sites, offset, mask, given, scores, bias
            found, eager = kernel.fn(q, k, *rest), reference.attention_pattern_rows(q, k, *rest)
            truth = reference.attention_pattern_rows(*wide, *rest[:4], None, scores, bias)
            seen = truth > -torch.inf
            assert torch.equal(found > -torch.inf, seen)
            # The log-sum-exp that is given is off by its own rounding.
            step = 8 * torch.finfo(found.dtype).eps * max([1.0, *truth[seen].abs().tolist()])
            assert_as_good(found[seen], eager[seen], truth[seen], dtype, floor=step)


def test_no_single_rows():
    q, k, _ = qkv(3, 5, 2)
    for kernel in cpu_kernels("attention_pattern_rows"):
        none = torch.zeros(0, 3, dtype=torch.long)
        assert kernel.values[0].fn(q, k, AttentionRule(1.0), none).shape == (0, 5)


@pytest.mark.parametrize("kernel", cpu_kernels("attention_with_pattern"))
@pytest.mark.parametrize("heads", [None, [2], [0, 1], [3, 0]], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_a_given_pattern(kernel, heads, kv_heads, dtype):
    v = qkv(1, 7, kv_heads, dtype)[2]
    pattern = torch.rand(2, 4 if heads is None else len(heads), 5, 7).softmax(-1).to(dtype)
    rest = (heads, None if heads is None else 4)
    judge(kernel.fn, reference.attention_with_pattern, [pattern, v], *rest)


# -- summaries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", cpu_kernels("attention_summary"))
@each_rule
@some_sizes
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_summaries(kernel, rule, size, dtype, blocks):
    n_queries, n_keys, offset, kv_heads = size
    q, k, _ = qkv(n_queries, n_keys, kv_heads, dtype)
    labels = torch.randint(-1, 3, (2, n_queries)), torch.randint(-1, 3, (2, n_keys))
    groups = [KeyGroup(*labels), KeyGroup(*labels, strict=False)]
    for heads, (mask, _, bias) in itertools.product((None, [3, 0]), added(n_queries, n_keys)):
        rest = rule, heads, (0, 1, 5, -1), groups, offset, mask, bias
        found = kernel.fn(q, k, *rest)
        eager = reference.attention_summary(q, k, *rest)
        truth = reference.attention_summary(q.double(), k.double(), *rest)
        for got, plain, want in zip(found, eager, truth, strict=True):
            assert_as_good(got, plain, want, dtype, floor=4 * torch.finfo(got.dtype).eps)


# -- the tests themselves --------------------------------------------------------------------------

MISTAKES = {
    "a key too many": (
        "visibility",
        lambda rule, queries, keys, mask: masks.visibility(rule, queries + 1, keys, mask),
    ),
    "the keys of another group": (
        "shared_kv_heads",
        lambda heads, group: ([head % 2 for head in heads], 1),
    ),
    "NaN for a row without keys": ("softmax", lambda scores, *_: torch.softmax(scores, -1)),
    "slopes of other heads": (
        "alibi_slopes",
        lambda n, *rest: masks.alibi_slopes(2 * n, *rest)[:n],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake, monkeypatch):
    (kernel,) = (kernel.values[0] for kernel in cpu_kernels("attention_pattern"))
    name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(score_blocks, name, wrong)
    if name == "softmax":
        monkeypatch.setattr(torch_attention_pattern, name, wrong)
    with pytest.raises(AssertionError, match="values differ"):
        test_patterns(kernel, RULES["everything"], SIZES["square"], "all", None)
