"""The pattern's summary, interpreted, between guard pages. Not run on a GPU."""

import pytest
import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from tests.close import assert_close_to
from tests.gpu.guard_pages import guarded, guarded_outputs
from tests.gpu.judged import RULES, check_summary
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.mutation import mutated
from tests.gpu.workers import Died, interpreted

pytestmark = NEEDS_TRITON

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def guarded_summary(**kwargs):
    with guarded_outputs():
        check_summary(place=guarded, **kwargs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rules(rule, dtype):
    is_padded = rule in ("causal", "everything", "window both ways")
    kwargs = {"rule": rule, "dtype": dtype, "is_padded": is_padded, "d_head": 20}
    interpreted(guarded_summary, **kwargs, n_queries=66, n_keys=75, heads=2, kv_heads=1)


@pytest.mark.parametrize(
    ("n_queries", "n_keys"), [(1, 1), (63, 63), (64, 64), (129, 129), (1, 130), (9, 3), (80, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails(n_queries, n_keys, dtype):
    interpreted(guarded_summary, n_queries=n_queries, n_keys=n_keys, dtype=dtype, heads=2)


@pytest.mark.parametrize("strides", ["sliced", "transposed"])
@pytest.mark.parametrize("bias", ["", "each", "of examples"])
def test_strides_and_biases(strides, bias):
    kwargs = {"strides": strides, "bias": bias, "dtype": torch.bfloat16, "n_queries": 11}
    interpreted(guarded_summary, **kwargs, n_keys=40, is_padded=True)


@pytest.mark.parametrize("d_head", [1, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes(d_head, dtype):
    interpreted(guarded_summary, d_head=d_head, dtype=dtype, n_queries=20, n_keys=33, heads=2)


@pytest.mark.parametrize("n_groups", [0, 1, 2, 5])
def test_any_number_of_groups(n_groups):
    interpreted(guarded_summary, n_groups=n_groups, n_queries=20, n_keys=33)


def check_edges():
    from fastlens.kernels.triton_attention_summary import attention_summary

    rule = AttentionRule(2.0)
    q, k = torch.randn(2, 1, 4, 2, 16).unbind(0)
    entropy, on_offsets, on_groups = attention_summary(q, k, rule)
    assert on_offsets.shape == on_groups.shape == (0, 1, 2, 4) and entropy.shape == (1, 2, 4)
    assert entropy[:, :, 0].abs().max() < 1e-6
    assert attention_summary(q[:, :0], k, rule, None, (1,))[1].shape == (1, 1, 2, 0)
    assert attention_summary(q, k, rule, (), (1,))[1].shape == (1, 1, 0, 4)
    # Wider heads than the kernel holds are PyTorch's.
    wide = torch.randn(1, 4, 2, 257)
    expected = reference.attention_summary(wide, wide, rule, None, (1,))
    for got, want in zip(attention_summary(wide, wide, rule, None, (1,)), expected, strict=True):
        assert_close_to(got, want)


def test_edges():
    interpreted(check_edges)


# A mistake -> what is right, what stands there instead.
MISTAKES = {
    "entropy not moved with the maximum": ("(moment + total * lowered)", "(moment)"),
    "entropy in bits": ("log2(divisor) * LN_2 - m", "log2(divisor) - m"),
    "a known sum of other rows": (
        "lse_ptr + statistics, mask=is_row, other=0.0",
        "lse_ptr + row, mask=is_row, other=0.0",
    ),
    "mass not rescaled": ("mass = mass * shrink[:, None]", "mass = mass * 1.0"),
    "mass not divided": ("mass = mass / divisor[:, None]", "mass = mass * 1.0"),
    "its own position counts": ("(STRICT >> g) & 1", "(STRICT >> g) & 0"),
    "negative labels count": ("(query_label[:, None] >= 0)", "(query_label[:, None] >= -1)"),
    "labels cut to 32 bits": ("key_label[None, :])", "key_label[None, :].to(tl.int32))"),
    "labels of another example": ("batch) * n_keys + key_pos", "0) * n_keys + key_pos"),
    "the first group's labels": ("(g * n_batch + batch) * n_queries", "(batch) * n_queries"),
    "another group's place": ("group[None, :] == g, in_group", "group[None, :] >= g, in_group"),
    "an offset one further": ("query_pos - tl.load(offsets", "query_pos - 1 - tl.load(offsets"),
    "kept heads counted as heads": (
        "head = tl.load(heads_ptr + batch_head % n_heads)\n    kv_head",
        "head = (batch_head % n_heads).to(tl.int64)\n    kv_head",
    ),
    "the first window block skipped": ("// BLOCK_N * BLOCK_N", "// BLOCK_N * BLOCK_N + BLOCK_N"),
}


def check_mistake(right, wrong):
    with mutated("attention_summary", right, wrong):
        for rule in ("everything", "causal"):
            check_summary(rule=rule, n_queries=70, n_keys=100, is_padded=rule == "everything")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake):
    right, wrong = MISTAKES[mistake]
    with pytest.raises(AssertionError) as error:
        interpreted(check_mistake, right=right, wrong=wrong)
    assert not isinstance(error.value, Died) and "values differ" in str(error.value)


def check_unmasked(right, wrong):
    with mutated("attention_summary", right, wrong):
        guarded_summary(n_queries=20, n_keys=33, rule="bidirectional")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mask=is_row[:, None] & is_channel[None, :],", "mask=is_channel[None, :],"),
        ("entropy, mask=is_row)", "entropy)"),
        ("mask=is_row[:, None] & (group", "mask=(group"),
        ("mass, mask=is_row)", "mass)"),
        ("& (key_pos < n_keys)\n", "\n"),
    ],
    ids=["load of queries", "store of entropy", "store of groups", "store of offsets", "a far key"],
)
def test_a_dropped_mask_hits_a_guard_page(right, wrong):
    with pytest.raises(Died):
        interpreted(check_unmasked, right=right, wrong=wrong)
