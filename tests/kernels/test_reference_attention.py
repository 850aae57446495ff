"""The specification of attention against cases worked out by hand."""

import math

import pytest
import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule, KeyGroup
from tests.close import assert_close_to


def test_attention_of_equal_scores_is_the_mean_of_what_is_visible():
    q = k = torch.zeros(1, 4, 2, 3)
    v = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 1, 3)
    z = reference.attention(q, k[:, :, :1], v, AttentionRule(1.0))
    assert torch.allclose(z[0, :, :, 0], torch.tensor([0.0, 0.5, 1.0, 1.5])[:, None].expand(4, 2))
    local = reference.attention(q, k[:, :, :1], v, AttentionRule(1.0, window=2))
    assert torch.allclose(local[0, :, 0, 0], torch.tensor([0.0, 0.5, 1.5, 2.5]))


def test_a_row_that_sees_no_key_gives_zeros():
    q = torch.randn(1, 3, 2, 4)
    mask = torch.tensor([[False, False, True]])
    scores = reference.attention_scores(q, q, AttentionRule(2.0), key_mask=mask)
    pattern = reference.pattern_of(scores)
    assert (scores[0, :, 0] == -torch.inf).all() and not pattern[0, :, :2].any()
    assert torch.equal(pattern[0, :, 2], torch.tensor([0.0, 0.0, 1.0]).expand(2, 3))


def test_soft_cap_and_alibi_enter_the_scores_in_order():
    q, k = torch.ones(1, 2, 2, 1), torch.full((1, 2, 2, 1), 100.0)
    rule = AttentionRule(1.0, soft_cap=5.0, alibi=True)
    scores = reference.attention_scores(q, k, rule)
    assert torch.allclose(scores[0, :, 1, 1], torch.full((2,), 5.0))
    assert torch.allclose(scores[0, :, 1, 0], 5.0 - torch.tensor([2**-4, 2**-8]))


# -- single rows of scores -----------------------------------------------------------------------

RULES = {
    "causal": AttentionRule(2.0),
    "all see all": AttentionRule(2.0, causal=False),
    "window": AttentionRule(2.0, window=2),
    "window both ways": AttentionRule(2.0, causal=False, window=2),
    "soft cap": AttentionRule(0.1, soft_cap=3.0),
    "alibi": AttentionRule(2.0, alibi=True),
    "alibi, all see all": AttentionRule(2.0, causal=False, alibi=True),
    "everything": AttentionRule(0.1, window=3, soft_cap=3.0, alibi=True),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_rows_of_scores_are_those_of_all_scores(rule, is_masked, kv_heads):
    """Every (example, position, head) as a row of its own, in an order of no meaning."""
    batch, n_pos, heads = 2, 5, 4
    q = torch.randn(batch, n_pos, heads, 3, dtype=torch.float64)
    k = torch.randn(batch, n_pos, kv_heads, 3, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False, True], [True] * 5]) if is_masked else None
    expected = reference.attention_scores(q, k, rule, key_mask=mask)
    places = torch.cartesian_prod(torch.arange(batch), torch.arange(n_pos), torch.arange(heads))
    example, pos, head = places[torch.randperm(len(places))].T
    keys = k[example, :, head // (heads // kv_heads)]
    found = reference.score_rows(
        *(q[example, pos, head], keys, rule, pos, head, heads),
        key_mask=None if mask is None else mask[example],
    )
    assert_close_to(found, expected[example, head, pos], atol=1e-12)


def test_a_row_of_scores_by_hand():
    q = torch.tensor([[2.0]])
    k = torch.tensor([[[1.0], [10.0], [3.0], [7.0]]])
    at, head = torch.tensor([2]), torch.tensor([1])
    found = reference.score_rows(q, k, AttentionRule(4.0, window=2), at, head, 2)
    assert found.tolist() == [[-math.inf, 5.0, 1.5, -math.inf]]
    found = reference.score_rows(q, k, AttentionRule(4.0, alibi=True), at, head, 2)
    assert torch.allclose(
        found[0, :3], torch.tensor([0.5, 5.0, 1.5]) - 2**-8 * torch.tensor([2, 1, 0])
    )


def test_no_rows_of_scores():
    q, k, none = torch.zeros(0, 3), torch.zeros(0, 5, 3), torch.zeros(0, dtype=torch.long)
    assert reference.score_rows(q, k, AttentionRule(1.0), none, none, 4).shape == (0, 5)


# -- what is made of scores ------------------------------------------------------------------------


def test_a_bias_enters_after_cap_and_alibi_and_before_the_mask():
    q, k = torch.ones(1, 2, 2, 1), torch.full((1, 2, 2, 1), 100.0)
    bias = torch.tensor([[7.0, 9.0], [1.0, 2.0]]).view(1, 1, 2, 2)
    scores = reference.attention_scores(q, k, AttentionRule(1.0, soft_cap=5.0), bias=bias)
    assert scores[0, 1].tolist() == [[12.0, -math.inf], [6.0, 7.0]]


def test_the_log_sum_exp_by_hand():
    q = k = v = torch.zeros(1, 3, 1, 2)
    mask = torch.tensor([[False, True, True]])
    z, lse = reference.attention_lse(q, k, v, AttentionRule(1.0), 0, mask)
    assert_close_to(lse.flatten(), [-math.inf, 0.0, math.log(2)])
    assert not z.any() and z.shape == v.shape
    half = q.half()
    assert reference.attention_lse(half, half, half, AttentionRule(1.0))[1].dtype == torch.float32


def test_a_row_without_keys_has_no_gradient():
    scores = torch.tensor([[-math.inf, -math.inf], [1.0, -math.inf]], requires_grad=True)
    (grad,) = torch.autograd.grad((reference.pattern_of(scores) ** 2).sum(), scores)
    assert not grad.any()


def test_a_given_pattern_reads_the_values_of_its_heads():
    v = torch.tensor([1.0, 10.0]).view(1, 1, 2, 1)
    pattern = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    whole = reference.attention_with_pattern(pattern, v)
    assert whole.flatten().tolist() == [1.0, 2.0, 30.0, 40.0]
    part = reference.attention_with_pattern(pattern[:, :2], v, [3, 0], 4)
    assert part.flatten().tolist() == [10.0, 2.0]
    part = reference.attention_with_pattern(pattern[:, :2], v, [1, 0])
    assert part.flatten().tolist() == [10.0, 2.0]


def test_a_summary_by_hand():
    q = k = torch.zeros(1, 4, 1, 1)
    labels = torch.tensor([[0, 1, 0, -1]])
    groups = [KeyGroup(labels, labels), KeyGroup(labels, labels, strict=False)]
    entropy, offsets, masses = reference.attention_summary(
        q, k, AttentionRule(1.0), None, (0, 2, -1), groups
    )
    assert_close_to(entropy.flatten(), [0.0, math.log(2), math.log(3), math.log(4)])
    third = 1 / 3
    assert_close_to(offsets.view(3, 4), [[1, 0.5, third, 0.25], [0, 0, third, 0.25], [0] * 4])
    assert_close_to(masses.view(2, 4), [[0, 0, third, 0], [1, 0.5, 2 * third, 0]])


def test_rows_by_hand():
    q, k = torch.ones(1, 2, 1, 1), torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    sites = torch.tensor([[0, 0, 1], [0, 0, 0]])
    rule = AttentionRule(1.0)
    found = reference.attention_pattern_rows(q, k, rule, sites)
    assert_close_to(found, [[0.25, 0.75], [1.0, 0.0]], atol=1e-7)
    lse = torch.tensor([0.0, math.log(4)]).view(1, 1, 2)
    assert_close_to(reference.attention_pattern_rows(q, k, rule, sites, lse=lse), found, atol=1e-7)
    found = reference.attention_pattern_rows(q, k, rule, sites, scores=True)
    assert_close_to(found, [[0.0, math.log(3)], [0.0, -math.inf]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_chosen_part_of_the_pattern(dtype):
    q, k, v = (x.to(dtype) for x in torch.randn(3, 2, 5, 4, 8, dtype=torch.float64).unbind(0))
    rule, mask = AttentionRule(2.0), torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    wide = torch.promote_types(torch.float32, dtype)
    scores = reference.attention_scores(q.to(wide), k.to(wide), rule, 0, mask)
    scores = scores[:, [2, 0]][:, :, [4, 0]]
    _, lse = reference.attention_lse(q.to(wide), k.to(wide), v.to(wide), rule, 0, mask)
    given = q, k, rule, [2, 0], [4, 0], 0, mask, None
    assert torch.equal(reference.attention_pattern(*given, scores=True), scores.to(dtype))
    pattern = reference.pattern_of(scores)
    assert not pattern[0, :, 1].any()
    for found in (reference.attention_pattern(*given), reference.attention_pattern(*given, lse)):
        assert found.dtype == dtype
        assert_close_to(found.to(wide), pattern, atol=4e-3 if dtype == torch.bfloat16 else 1e-12)
    assert reference.attention_pattern(q, k, rule).shape == (2, 4, 5, 5)
