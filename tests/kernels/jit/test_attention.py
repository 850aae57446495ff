"""Fused attention and rows of its pattern, interpreted, between guard pages. Not run on a GPU."""

import pytest
import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from tests.close import assert_close_to, assert_no_worse
from tests.gpu.guard_pages import guarded, guarded_outputs
from tests.gpu.judged import RULES, check_attention, inputs, padding
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.mutation import mutated
from tests.gpu.workers import Died, interpreted

pytestmark = NEEDS_TRITON

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def guarded_attention(**kwargs):
    with guarded_outputs():
        check_attention(place=guarded, **kwargs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rules(rule, dtype):
    interpreted(
        guarded_attention,
        rule=rule,
        dtype=dtype,
        is_padded=rule in ("causal", "alibi", "everything", "window both ways"),
        n_queries=70,
        n_keys=77,
        kv_heads=1,
        d_head=20,
    )


@pytest.mark.parametrize(
    ("n_queries", "n_keys"), [(1, 1), (63, 63), (64, 64), (129, 129), (1, 130), (65, 200), (9, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails(n_queries, n_keys, dtype):
    interpreted(guarded_attention, n_queries=n_queries, n_keys=n_keys, dtype=dtype)


@pytest.mark.parametrize("rule", RULES)
def test_queries_beyond_the_keys(rule):
    interpreted(guarded_attention, n_queries=80, n_keys=3, rule=rule)


@pytest.mark.parametrize("strides", ["sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_strides_and_groups(strides, dtype, heads, kv_heads):
    interpreted(
        guarded_attention,
        strides=strides,
        dtype=dtype,
        heads=heads,
        kv_heads=kv_heads,
        n_queries=11,
        n_keys=40,
        is_padded=True,
    )


@pytest.mark.parametrize("d_head", [1, 16, 32, 64, 80, 128, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(d_head, dtype):
    interpreted(guarded_attention, d_head=d_head, dtype=dtype, n_queries=20, n_keys=33)


def check_1000_tokens():
    check_attention(
        n_queries=1000, n_keys=1000, heads=1, kv_heads=1, dtype=torch.bfloat16, rule="window"
    )


def test_a_long_odd_size():
    interpreted(check_1000_tokens)


BIASES = ["each", "of heads", "of examples", "shared"]


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases(bias, dtype):
    kwargs = {"bias": bias, "dtype": dtype, "heads": 4, "is_padded": bias == "each"}
    interpreted(guarded_attention, **kwargs, n_queries=66, n_keys=75, d_head=20)


@pytest.mark.parametrize("rule", RULES)
def test_biases_under_rules(rule):
    interpreted(guarded_attention, bias="each", rule=rule, n_queries=20, n_keys=41, is_padded=True)


def check_edges():
    from fastlens.kernels.triton_attention import attention
    from fastlens.kernels.triton_attention_lse import attention_lse
    from fastlens.kernels.triton_attention_pattern_rows import attention_pattern_rows

    rule = AttentionRule(2.0)
    q, k, v = torch.randn(3, 1, 4, 2, 16).unbind(0)
    # Wider heads than the kernel holds are PyTorch's.
    wide, bias = torch.randn(1, 4, 2, 257), torch.randn(1, 2, 4, 4)
    expected, expected_lse = reference.attention_lse(wide, wide, wide, rule, 0, None, bias)
    assert_close_to(attention(wide, wide, wide, rule, 0, None, bias), expected)
    assert_close_to(attention_lse(wide, wide, wide, rule, 0, None, bias)[1], expected_lse)
    none = torch.zeros(0, 3, dtype=torch.int64)
    assert attention_pattern_rows(q, k, rule, none).shape == (0, 4)
    no_keys = torch.zeros(1, 0, 2, 16)
    z, lse = attention_lse(q, no_keys, no_keys, AttentionRule(2.0, causal=False))
    assert not z.any() and (lse == -torch.inf).all()
    assert attention(q[:, :0], k, v, rule, 4).shape == (1, 0, 2, 16)


def test_edges():
    interpreted(check_edges)


def check_registered(rule, dtype):
    """The public functions, where the kernels are those a GPU has."""
    from fastlens.kernels.kernel import Kernel
    from fastlens.ops import dispatch
    from fastlens.ops.attention import attention

    everywhere = {}
    for op, kernels in dispatch.kernels().items():
        of_triton = [k for k in kernels if k.name.startswith("triton")]
        everywhere[op] = [
            Kernel(k.op, k.name, k.fn, lambda *_: None, k.priority, k.is_opaque) for k in of_triton
        ] or kernels
    dispatch.kernels = lambda: everywhere
    dispatch._CHOSEN.clear()
    given = inputs(40, 45, 4, 2, 16, dtype, "sliced")
    mask, bias = padding(45), torch.randn(1, 4, 40, 45).to(dtype)
    weight = torch.linspace(-1, 1, given[0].numel()).view(given[0].shape)

    def gradients(attend, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (*given, bias)]
        z = attend(*leaves[:3], RULES[rule], 5, mask, leaves[3])
        return torch.autograd.grad((z * weight.to(dtype)).sum(), leaves)

    assert dispatch.is_opaque("attention", "cpu", dtype)
    truth = gradients(reference.attention, torch.float64)
    eager = gradients(reference.attention, dtype)
    for got, plain, want in zip(gradients(attention, dtype), eager, truth, strict=True):
        assert got.dtype == dtype
        assert_no_worse(got, plain, want, factor=3, name=f"gradient, {rule}")


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [("everything", torch.float32), ("everything", torch.bfloat16), ("causal", torch.float16)],
)
def test_the_registered_op_has_the_gradient(rule, dtype):
    interpreted(check_registered_alone, rule=rule, dtype=dtype)


def check_registered_alone(rule, dtype):
    """And nothing of it stays."""
    from fastlens.ops import dispatch

    kernels, chosen = dispatch.kernels, dict(dispatch._CHOSEN)
    try:
        check_registered(rule, dtype)
    finally:
        dispatch.kernels = kernels
        dispatch._CHOSEN.clear()
        dispatch._CHOSEN.update(chosen)
        dispatch._OPAQUE.clear()


# A mistake -> what is right, what stands there instead.
MISTAKES = {
    "the diagonal is hidden": ("key_pos <= query_pos)", "key_pos < query_pos)"),
    "a window one too wide": ("key_pos > query_pos - window", "key_pos >= query_pos - window"),
    "the first window block skipped": (
        "offset + first_row - window + 1) // BLOCK_N",
        "offset + first_row - window + 1 + BLOCK_N) // BLOCK_N",
    ),
    "the first keys of a row skipped": (
        "query_pos - window + 1) // BLOCK_N",
        "query_pos - window + 1 + BLOCK_N) // BLOCK_N",
    ),
    "no rescaling": ("total * shrink + tl.sum", "total + tl.sum"),
    "a sum that fades": ("weights.to(v.dtype), v, mixed", "weights.to(v.dtype), v, 0.99 * mixed"),
    "bare softmax statistics": ("highest + tl.math.log2(divisor) * LN_2)", "highest)"),
    "wrong head of keys": ("(head // group_size).to", "(head % group_size).to"),
    "the bias of another head": ("+ head * stride_bias_h\n", "+ stride_bias_h\n"),
    "the bias of other keys": ("first_key, tl.int64) * stride_bias_n", "first_key, tl.int64)"),
    "the bias of a row below": ("head * stride_bias_h + row * str", "head * stride_bias_h + str"),
    "each row divided by one sum": ("tl.load(lse_ptr + site)", "tl.load(lse_ptr)"),
    "a row's last keys left out": ("(n_keys, query_pos + 1)", "(n_keys, query_pos) // 128 * 128"),
    "tanh by the cancelling formula": ("size < 0.625", "size < 0.0"),
    "alibi on the wrong side": ("minimum(key_pos - query_pos", "minimum(query_pos - key_pos"),
}


def check_mistake(right, wrong):
    with mutated("attention", right, wrong):
        for rule in ("everything", "large soft cap"):
            check_attention(
                rule=rule,
                n_queries=75,
                n_keys=140,
                heads=4,
                kv_heads=2,
                is_padded=rule == "everything",
                bias="of heads",
            )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake):
    right, wrong = MISTAKES[mistake]
    with pytest.raises(AssertionError) as error:
        interpreted(check_mistake, right=right, wrong=wrong)
    assert not isinstance(error.value, Died) and "values differ" in str(error.value)


def check_unmasked(right, wrong):
    with mutated("attention", right, wrong):
        guarded_attention(n_queries=20, n_keys=33, rule="bidirectional", d_head=16)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mask=is_key[None, :] & (channel[:, None] < D_HEAD),", "mask=channel[:, None] < D_HEAD,"),
        ("mask=(first_key + column[:, None] < n_keys) & is_ch", "mask=is_ch"),
        ("mask=is_row[:, None] & is_channel[None, :],", "mask=is_channel[None, :],"),
        ("lse, mask=is_row)", "lse)"),
    ],
    ids=["load of keys", "load of values", "store of the output", "store of the log-sum-exp"],
)
def test_a_dropped_mask_hits_a_guard_page(right, wrong):
    with pytest.raises(Died):
        interpreted(check_unmasked, right=right, wrong=wrong)
