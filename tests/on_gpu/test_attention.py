"""Attention in all its forms, by every kernel that the device has, against float64."""

import pytest
import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from tests.on_gpu.kernels import DTYPES, SIZES, families, judge, placed

RULES = {
    "causal": AttentionRule(3.0),
    "bidirectional": AttentionRule(3.0, causal=False),
    "window": AttentionRule(3.0, window=5),
    "everything": AttentionRule(3.0, window=70, soft_cap=5.0, alibi=True),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poison_empty")


def qkv(device, dtype, n_queries, n_keys, kv_heads=2, d_head=16, strides="whole"):
    shapes = (n_queries, 4), (n_keys, kv_heads), (n_keys, kv_heads)
    drawn = [torch.randn(2, n_pos, heads, d_head) for n_pos, heads in shapes]
    return [placed(x, strides, device, dtype) for x in drawn]


def padding(n_keys, device):
    """Left padding in one example, so that its first rows see no key; holes in the other."""
    mask = torch.ones(2, n_keys, dtype=torch.bool)
    mask[0, : n_keys // 2] = False
    mask[1, 1::3] = False
    return mask.to(device)


def to(device, *given):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in given]


@each_rule
@each_dtype
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_padded", [False, True])
def test_values(device, dtype, rule, size, is_padded):
    from fastlens.ops.attention import attention

    inputs = qkv(device, dtype, size, size)
    mask = padding(size, device) if is_padded else None
    judge(
        *(["attention"], device),
        lambda *x: attention(*x, rule, 0, mask),
        lambda *x: reference.attention(*x, rule, 0, *to(x[0].device, mask)),
        inputs,
    )


@each_rule
@pytest.mark.parametrize("strides", ["sliced", "transposed"])
@pytest.mark.parametrize("d_head", [8, 64, 80, 128, 256])
@pytest.mark.parametrize(("n_queries", "n_keys", "kv_heads"), [(1, 65, 4), (7, 33, 1), (40, 40, 2)])
def test_strides_heads_and_offsets(device, rule, strides, d_head, n_queries, n_keys, kv_heads):
    from fastlens.ops.attention import attention

    rule = rule._replace(scale=d_head**0.5)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = qkv(device, dtype, n_queries, n_keys, kv_heads, d_head, strides)
        offset = n_keys - n_queries
        judge(
            *(["attention"], device),
            lambda *x, offset=offset: attention(*x, rule, offset),
            lambda *x, offset=offset: reference.attention(*x, rule, offset),
            inputs,
        )


@each_rule
@each_dtype
@pytest.mark.parametrize("size", [1, 63, 600])
@pytest.mark.parametrize("is_padded", [False, True])
def test_gradients(device, dtype, rule, size, is_padded):
    from fastlens.ops.attention import attention

    inputs = qkv(device, dtype, size, size)
    mask = padding(size, device) if is_padded else None
    judge(
        *(["attention"], device),
        lambda *x: attention(*x, rule, 0, mask),
        lambda *x: reference.attention(*x, rule, 0, *to(x[0].device, mask)),
        inputs,
        gradients=not is_padded,
    )


@each_rule
@each_dtype
@pytest.mark.parametrize("size", SIZES[:3])
def test_a_bias_and_its_gradient(device, dtype, rule, size):
    from fastlens.ops.attention import attention

    inputs = qkv(device, dtype, size, size)
    bias = placed(torch.randn(1, 4, size, size), "transposed", device, dtype)
    judge(
        *(["attention"], device),
        lambda q, k, v, b: attention(q, k, v, rule, 0, None, b),
        lambda q, k, v, b: reference.attention(q, k, v, rule, 0, None, b),
        [*inputs, bias],
        gradients=True,
    )


@each_rule
@each_dtype
@pytest.mark.parametrize("size", SIZES)
def test_log_sum_exp_and_the_pattern_from_it(device, dtype, rule, size):
    """All rows of two heads, and single rows, divided by what the fused pass summed."""
    from fastlens.ops.attention import attention_with_lse
    from fastlens.ops.attention_pattern import attention_pattern, attention_pattern_rows

    q, k, v = qkv(device, dtype, size, size)
    mask = padding(size, device)
    heads = [3, 0]
    sites = torch.tensor([[0, 0, 0], [1, 3, size - 1], [1, 2, size // 2]], device=device)
    wide = reference.attention_scores(q.double().cpu(), k.double().cpu(), rule, 0, mask.cpu())
    pattern = reference.pattern_of(wide)
    blind = wide.logsumexp(-1) == -torch.inf
    ops = ["attention_lse", "attention_pattern", "attention_pattern_rows"]
    for name, kernels in families(ops, device, dtype):
        with kernels, torch.no_grad():
            z, lse = attention_with_lse(q, k, v, rule, 0, mask)
            found = attention_pattern(q, k, rule, heads, None, 0, mask, lse=lse)
            rows = attention_pattern_rows(q, k, rule, sites, 0, mask, lse=lse)
        assert lse.dtype == torch.float32, name
        assert torch.equal(lse.cpu() == -torch.inf, blind), name
        seen = ~blind
        error = (lse.cpu().double() - wide.logsumexp(-1))[seen].abs()
        # PyTorch's own, of 16-bit inputs on a CPU, is worse than float32's.
        bound = (2e-5 if dtype == torch.float32 else 1e-4) * (1 + wide[wide.isfinite()].abs().max())
        assert error.numel() == 0 or error.max() <= bound, name
        step = torch.finfo(found.dtype).eps + 2e-5
        assert (found.cpu().double() - pattern[:, heads]).abs().max() <= step, name
        step = torch.finfo(dtype).eps + 2e-5
        assert (rows.cpu().double() - pattern[tuple(sites.cpu().T)]).abs().max() <= step, name
        assert not z[0, : size // 2].any() or not rule.causal, name


@each_dtype
@pytest.mark.parametrize("size", SIZES[:3])
def test_a_given_pattern(device, dtype, size):
    from fastlens.ops.attention_pattern import attention_with_pattern

    _, _, v = qkv(device, dtype, size, size)
    pattern = torch.rand(2, 4, size, size).softmax(-1).to(device, dtype)
    judge(
        *(["attention_with_pattern"], device),
        attention_with_pattern,
        reference.attention_with_pattern,
        [pattern, v],
        gradients=True,
    )


@each_rule
@each_dtype
@pytest.mark.parametrize("size", SIZES[:3])
def test_summaries(device, dtype, rule, size):
    """Against the pattern in float64."""
    from fastlens.ops.attention_summary import KeyGroup, attention_summary

    q, k, _ = qkv(device, dtype, size, size)
    mask = padding(size, device)
    labels = torch.randint(0, 4, (2, size), device=device)
    wide = reference.attention_scores(q.double().cpu(), k.double().cpu(), rule, 0, mask.cpu())
    pattern = reference.pattern_of(wide)
    order = torch.arange(size)
    same = (labels.cpu()[:, :, None] == labels.cpu()[:, None]) & (order[:, None] != order)
    expected = {
        "entropy": -torch.special.xlogy(pattern, pattern).sum(-1),
        "offset_mass": (pattern * (order[:, None] - order == 1)).sum(-1)[None],
        "group_mass": (pattern * same[:, None]).sum(-1)[None],
    }
    for name, kernels in families(["attention_summary"], device, dtype):
        with kernels, torch.no_grad():
            options = {"offsets": (1,), "groups": [KeyGroup(labels, labels)], "key_mask": mask}
            found = attention_summary(q, k, rule, top_k=1, **options)
        for field, want in expected.items():
            error = (getattr(found, field).double().cpu() - want).abs().max()
            assert error <= 1e-4, f"{name}: {field} is off by {error}"
        weights = found.top_weights.double().cpu()[..., 0]
        assert (weights - pattern.max(-1).values).abs().max() <= 1e-4 + torch.finfo(dtype).eps, name


@each_rule
@each_dtype
@pytest.mark.parametrize("prefix", [0, 3, 130])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_suffix_attention(device, dtype, rule, prefix, kv_heads):
    """Ragged suffixes of five branches behind a shared prefix."""
    from benchmarks.cuda_work import Branches, packed
    from fastlens.ops.suffix_attention import suffix_attention

    stop = prefix + 9
    table, spans, n_rows = packed([Branches(3, prefix, stop), Branches(2, prefix + 4, stop)])
    on_device = [span._replace(branches=span.branches.to(device)) for span in spans]
    drawn = [torch.randn(n_rows, heads, 16).to(device, dtype) for heads in (4, kv_heads, kv_heads)]
    judge(
        *(["suffix_attention", "attention", "attention_lse"], device),
        lambda *x: suffix_attention(*x, table.to(device), on_device, rule),
        lambda *x: reference.suffix_attention(*x, *_at(x[0].device, table, spans), rule),
        drawn,
    )


def _at(device, table, spans):
    spans = [span._replace(branches=span.branches.to(device)) for span in spans]
    return table.to(device), spans


@pytest.mark.parametrize("kind", ["attention", "gradient", "one head's pattern"])
def test_memory_grows_with_the_length_and_not_its_square(device, peak_bytes, kind):
    from fastlens.ops.attention import attention, attention_with_lse
    from fastlens.ops.attention_pattern import attention_pattern

    lengths = (1024, 4096) if device.type == "cuda" else (1024, 2048)
    rule = AttentionRule(4.0)

    def peak_of(length: int) -> int:
        q, k, v = (torch.randn(1, length, 8, 16, device=device) for _ in range(3))

        def run() -> object:
            if kind == "attention":
                return attention(q, k, v, rule)
            if kind == "gradient":
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                return torch.autograd.grad(attention(*leaves, rule).sum(), leaves)
            _, lse = attention_with_lse(q, k, v, rule)
            return attention_pattern(q, k, rule, [5], lse=lse)

        with torch.set_grad_enabled(kind == "gradient"):
            run()
            return peak_bytes(run)

    for name, kernels in families(["attention", "attention_lse"], device, torch.float32):
        with kernels:
            short, long = (peak_of(length) for length in lengths)
        growth = lengths[1] / lengths[0]
        if kind == "one head's pattern":
            # That head's pattern, what it is made from, and blocks of it: never eight heads'.
            assert long <= 4 * 4 * lengths[1] ** 2, f"{name}: {long} bytes"
        else:
            assert long <= 1.3 * growth * short, f"{name}: {short} bytes, then {long}"
