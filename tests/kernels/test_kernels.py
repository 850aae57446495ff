"""Every kernel that runs here against the specification in float64, forward and backward."""

import pytest
import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.ops.dispatch import kernels
from tests.close import assert_no_worse

RULES = {
    "causal": AttentionRule(3.0),
    "bidirectional": AttentionRule(3.0, causal=False),
    "window": AttentionRule(3.0, window=5),
    "soft_cap": AttentionRule(3.0, soft_cap=2.0),
    "alibi": AttentionRule(3.0, alibi=True),
    "alibi_window": AttentionRule(3.0, alibi=True, window=7),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cpu_kernels(op):
    return [
        pytest.param(kernel, id=kernel.name)
        for kernel in kernels()[op]
        if kernel.refuses(torch.device("cpu"), torch.float32) is None
    ]


def judge(kernel, spec, inputs, *args):
    """Values and gradients no worse than the specification's own in the same dtype."""

    def run(fn, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = fn(*leaves, *args)
        # A fixed cotangent, so that every gradient is asked for.
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        grads = torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)
        return out.detach(), grads

    dtype = inputs[0].dtype
    out, grads = run(kernel, dtype)
    eager, eager_grads = run(spec, dtype)
    truth, true_grads = run(spec, torch.float64)
    assert_no_worse(out, eager, truth)
    for got, plain, want in zip(grads, eager_grads, true_grads, strict=True):
        # A gradient that is exactly zero in truth (one key) is a difference of numbers near one.
        floor = torch.finfo(dtype).eps * max(1.0, float(want.abs().max())) * 4
        assert_no_worse(got, plain, want, factor=3, floor=floor, name="gradient")


def qkv(n_queries, n_keys, kv_heads, dtype, d_head=8):
    big = torch.randn(2, n_keys, 4, 3 * d_head + 1)  # sliced below, so strides are honest
    q = big[:, n_keys - n_queries :, :, :d_head]
    k, v = big[:, :, :kv_heads, d_head : 2 * d_head], big[:, :, :kv_heads, 2 * d_head : 3 * d_head]
    return [x.to(dtype) for x in (q, k, v)]


@pytest.mark.parametrize("kernel", cpu_kernels("attention"))
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_queries", "n_keys", "kv_heads"), [(1, 1, 4), (13, 13, 2), (3, 12, 1)])
def test_attention(kernel, rule, dtype, n_queries, n_keys, kv_heads):
    inputs = qkv(n_queries, n_keys, kv_heads, dtype)
    judge(kernel.fn, reference.attention, inputs, rule, n_keys - n_queries)


@pytest.mark.parametrize("kernel", cpu_kernels("attention"))
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("offset", [0, 2])
def test_attention_with_padding(kernel, rule, offset):
    inputs = qkv(9, 9 + offset, 2, torch.float32)
    mask = torch.ones(2, 9 + offset, dtype=torch.bool)
    mask[0, :4] = False  # the first rows see no key at all
    mask[1, -2:] = False
    judge(kernel.fn, reference.attention, inputs, rule, offset, mask)
    q, k, v = inputs
    z = kernel.fn(q, k, v, rule, offset, mask)
    assert torch.isfinite(z).all()
    if rule.causal and offset == 0:
        assert not z[0, :4].any()


@pytest.mark.parametrize("kernel", cpu_kernels("attention"))
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_attention_in_several_row_blocks(kernel, rule, monkeypatch):
    import fastlens.kernels.torch_attention as blocks

    monkeypatch.setattr(blocks, "ROWS_PER_BLOCK", 4)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :5] = False
    inputs = qkv(11, 11, 2, torch.float32)
    judge(kernel.fn, reference.attention, inputs, rule, 0, mask)


@pytest.mark.parametrize("kernel", cpu_kernels("layer_norm"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [7, 63, 129, 1000])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(kernel, dtype, d, affine):
    x = (torch.randn(3, d + 5)[:, 2 : d + 2] * 3 + 1).to(dtype)
    if affine:
        inputs = [x, torch.randn(d).to(dtype), torch.randn(d).to(dtype)]
        judge(kernel.fn, reference.layer_norm, inputs, 1e-5)
    else:
        judge(
            lambda x, eps: kernel.fn(x, None, None, eps),
            lambda x, eps: reference.layer_norm(x, None, None, eps),
            [x],
            1e-5,
        )


@pytest.mark.parametrize("kernel", cpu_kernels("rms_norm"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 63, 1000, 2000, 16384])
def test_rms_norm(kernel, dtype, d):
    x = torch.randn(3, 2, d).transpose(0, 1).to(dtype)
    judge(kernel.fn, reference.rms_norm, [x, torch.randn(d).to(dtype)], 1e-6)


@pytest.mark.parametrize("kernel", cpu_kernels("rotary"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adjacent_pairs", [True, False])
@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_rotary(kernel, dtype, adjacent_pairs, rotary_dim):
    angles = torch.rand(2, 5, rotary_dim // 2, dtype=torch.float64) * 6
    angles = angles.repeat_interleave(2, -1) if adjacent_pairs else torch.cat([angles, angles], -1)
    x = torch.randn(2, 5, 3, 8).to(dtype)
    # cos and sin are tables, not leaves: given in the dtype of the run.
    judge(
        lambda x: kernel.fn(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype), adjacent_pairs),
        lambda x: reference.rotary(
            x, angles.cos().to(x.dtype), angles.sin().to(x.dtype), adjacent_pairs
        ),
        [x],
    )
