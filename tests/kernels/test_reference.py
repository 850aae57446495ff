"""The specification against cases worked out by hand."""

import math

import pytest
import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from tests.close import assert_close_to


def test_layer_norm_of_a_known_row():
    x = torch.tensor([[1.0, 3.0]])
    out = reference.layer_norm(x, torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]), eps=0.0)
    assert torch.allclose(out, torch.tensor([[-1.0, 2.0]]))


def test_rms_norm_of_a_known_row():
    out = reference.rms_norm(torch.tensor([[3.0, 4.0]]), None, eps=0.0)
    assert torch.allclose(out, torch.tensor([[3.0, 4.0]]) / math.sqrt(12.5))


def test_rotary_by_a_quarter_turn():
    x = torch.tensor([1.0, 0.0, 0.0, 0.0, 9.0]).view(1, 1, 1, 5)
    cos, sin = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    halves = reference.rotary(x, cos, sin, adjacent_pairs=False).flatten()
    pairs = reference.rotary(x, cos, sin, adjacent_pairs=True).flatten()
    assert halves.tolist() == [0.0, 0.0, 1.0, 0.0, 9.0]
    assert pairs.tolist() == [0.0, 1.0, 0.0, 0.0, 9.0]


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
    pattern = reference.attention_pattern(scores)
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
