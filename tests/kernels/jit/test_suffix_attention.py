"""Attention of packed rows by a table, interpreted, between guard pages. Not run on a GPU."""

import pytest
import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.spans import Span
from tests.close import assert_close_to
from tests.gpu.guard_pages import guarded, guarded_outputs
from tests.gpu.judged import RULES, check_suffix
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.mutation import mutated
from tests.gpu.workers import Died, interpreted

pytestmark = NEEDS_TRITON

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Branches from three positions on, some of them twice: prefixes of 20 and of 40 keys are shared.
STARTS = (20, 20, 20, 20, 40, 40, 40, 69)


def guarded_suffix(wants_shared=None, **kwargs):
    with guarded_outputs():
        _, n_shared = check_suffix(place=guarded, **kwargs)
    if wants_shared is not None:
        assert (n_shared > 0) == wants_shared, n_shared


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rules(rule, dtype):
    interpreted(
        guarded_suffix,
        rule=rule,
        dtype=dtype,
        is_padded=rule in ("causal", "everything", "window both ways"),
        starts=STARTS,
        n_pos=70,
        kv_heads=1,
        d_head=20,
        wants_shared=None if "window" in rule else True,
    )


@pytest.mark.parametrize("rule", ["causal", "bidirectional", "everything"])
def test_in_one_launch(rule):
    """Nothing is shared: each branch goes over its whole prefix."""
    kwargs = {"starts": STARTS, "n_pos": 70, "rule": rule, "state_cost": 10**6}
    interpreted(guarded_suffix, wants_shared=False, **kwargs)


@pytest.mark.parametrize(
    ("starts", "n_pos"),
    [((0, 0), 1), ((62,) * 20, 63), ((100,) * 3, 129), ((0, 64, 64), 65), ((128, 128), 130)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails(starts, n_pos, dtype):
    interpreted(guarded_suffix, starts=starts, n_pos=n_pos, dtype=dtype)


# Spans in any order; one row a branch; two parts of one branch; rows of a run and of a branch.
WANTED = {
    "one row": [([2, 3, 4, 5], 29, 30)],
    "rows inside": [([4, 2], 12, 20), ([3], 25, 27)],
    "parts of a branch": [([2, 3], 11, 14), ([2, 3, 5], 20, 22), ([2], 16, 17)],
    "backwards": [([5, 4], 18, 30), ([1], 3, 9), ([0], 0, 30)],
    "nothing": [],
}


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("rule", ["causal", "bidirectional", "everything"])
def test_spans(wanted, rule):
    kwargs = {"starts": (10, 10, 11, 18), "n_pos": 30, "wanted": WANTED[wanted], "rule": rule}
    interpreted(guarded_suffix, **kwargs, is_padded=True, heads=4)


@pytest.mark.parametrize("strides", ["sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_strides_and_groups(strides, dtype, heads, kv_heads):
    kwargs = {"strides": strides, "dtype": dtype, "heads": heads, "kv_heads": kv_heads}
    interpreted(guarded_suffix, **kwargs, is_padded=True)


@pytest.mark.parametrize("d_head", [1, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes(d_head, dtype):
    interpreted(guarded_suffix, d_head=d_head, dtype=dtype, starts=(9, 9, 30), n_pos=33)


def check_edges():
    from fastlens.kernels.triton_suffix_attention import suffix_attention

    rule = AttentionRule(2.0)
    table = torch.arange(6).view(2, 3)
    q, k, v = torch.randn(3, 6, 2, 16).unbind(0)
    for spans in ([], [Span(torch.zeros(0, dtype=torch.int64), 0, 2)]):
        assert suffix_attention(q, k, v, table, spans, rule).shape == (0, 2, 16)
    # Wider heads than the kernel holds are PyTorch's.
    spans = [Span(torch.tensor([1, 0]), 1, 3)]
    q, k, v = torch.randn(3, 6, 2, 257).unbind(0)
    expected = reference.suffix_attention(q, k, v, table, spans, rule)
    assert_close_to(suffix_attention(q, k, v, table, spans, rule), expected)


def test_edges():
    interpreted(check_edges)


# A mistake -> what is right, what stands there instead.
MISTAKES = {
    "the first keys forgotten": ("tl.where(has_state, 1.0, 0.0)", "tl.where(has_state, 0.0, 0.0)"),
    "their sum forgotten": (
        'highest = tl.load(state_lse_ptr + written, mask=is_row, other=-float("inf"))',
        'highest = tl.load(state_lse_ptr + written, mask=is_row, other=-float("inf")) * 0.0',
    ),
    "their values forgotten": ("mask=inside & has_state[:, None]", "mask=inside & (1 == 0)"),
    "a sum in bits": ("log2(divisor) * LN_2)", "log2(divisor))"),
    "a state not divided": ("mixed = mixed / divisor[:, None]\n    if", "mixed = mixed\n    if"),
    "a prefix one key too short": ("key_pos < high\n", "key_pos < high - LEAVES_STATE\n"),
    "own keys one late": ("range(low, high", "range(low + HAS_STATE, high"),
    "keys by position": ("+ packed[None, :] * stride_k_n", "+ key_pos[None, :] * stride_k_n"),
    "values by position": ("+ packed[:, None] * stride_v_n", "+ key_pos[:, None] * stride_v_n"),
    "rows of another branch": ("table_ptr + branch * stride_table_b", "table_ptr"),
    "the mask of another branch": ("key_mask_ptr, branch, key_pos", "key_mask_ptr, 0, key_pos"),
    "a packed position": (
        "            query_pos[:, None], key",
        "            in_tile[:, None], key",
    ),
    "the query of another row": ("q_row[:, None] * stride_q_m", "out_row[:, None] * stride_q_m"),
    "wrong head of keys": ("kv_head = head // group_size", "kv_head = head % group_size"),
    "no rescaling": ("mixed * shrink[:, None], input", "mixed, input"),
}


def check_mistake(right, wrong):
    with mutated("suffix_attention", right, wrong):
        for rule in ("everything", "causal"):
            kwargs = {"starts": STARTS, "n_pos": 70, "is_padded": rule == "everything"}
            check_suffix(rule=rule, heads=4, kv_heads=2, state_cost=-64, **kwargs)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake):
    right, wrong = MISTAKES[mistake]
    with pytest.raises(AssertionError) as error:
        interpreted(check_mistake, right=right, wrong=wrong)
    assert not isinstance(error.value, Died) and "values differ" in str(error.value)


def check_wrong_tiles(which, column, by):
    """What the kernel gives if the host's tiles are off: ``column`` of one launch's, by ``by``."""
    from fastlens.kernels import suffix_tiles

    right = suffix_tiles.tiles_of

    def wrong(*args, **kwargs):
        made = right(*args, **kwargs)
        column_of_all = made[which].tiles[:, column]
        column_of_all[:] = (column_of_all + by).clip(0)
        return made

    suffix_tiles.tiles_of = wrong
    try:
        check_suffix(starts=STARTS, n_pos=70)
    finally:
        suffix_tiles.tiles_of = right


@pytest.mark.parametrize(
    ("which", "column", "by"),
    [(0, 3, 1), (0, 4, -1), (1, 3, 1), (1, 3, -1), (1, 4, -1), (1, 1, -1), (1, 2, -1)],
    ids=[
        "a prefix starts late",
        "a prefix ends early",
        "own keys start late",
        "own keys start early",
        "own keys end early",
        "a row left out",
        "another branch",
    ],
)
def test_bounds_of_tiles_that_are_off_are_caught(which, column, by):
    with pytest.raises(AssertionError, match="values differ"):
        interpreted(check_wrong_tiles_poisoned, which=which, column=column, by=by)


def check_wrong_tiles_poisoned(**kwargs):
    """With outputs full of NaN, so that a row that nobody writes is seen."""
    with guarded_outputs():
        check_wrong_tiles(**kwargs)


def check_unmasked(right, wrong):
    with mutated("suffix_attention", right, wrong):
        guarded_suffix(starts=(9, 9, 30), n_pos=33, rule="bidirectional")


def test_a_dropped_mask_hits_a_guard_page():
    right = "mask=is_key,\n            other=0,\n        ).to(tl.int64)"
    with pytest.raises(Died):
        interpreted(check_unmasked, right=right, wrong=right.replace("is_key", "key_pos >= 0"))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("element_ty), mask=inside)", "element_ty), mask=is_channel[None, :])"),
        ("state_ptr + at, mixed, mask=inside)", "state_ptr + at, mixed, mask=is_channel[None, :])"),
    ],
    ids=["of the output", "of the state"],
)
def test_a_store_of_rows_that_a_tile_does_not_have_is_caught(right, wrong):
    """They are the first row of the output to it, whatever that holds by then."""
    with pytest.raises(AssertionError, match="values differ"):
        interpreted(check_unmasked, right=right, wrong=wrong)
