"""The specification of attention over packed rows, on cases worked out by hand and laid out."""

import math

import pytest
import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.spans import Span
from tests.close import assert_close_to

# Two branches of four positions: the second has its own row at position 2.
TABLE = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 3]])
BOTH = torch.tensor([0, 1])


def rows(*numbers):
    """Packed rows of one head and one channel."""
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1)


def test_by_hand():
    q, k, v = torch.zeros(5, 1, 1).double(), rows(0, 0, 0, 0, 0), rows(1, 2, 3, 4, 5)
    one = [Span(BOTH, 1, 3)]
    z = reference.suffix_attention(q, k, v, TABLE, one, AttentionRule(1.0))
    # Equal scores: the mean of what is seen. Branch 0 at 1 and 2, then branch 1.
    assert_close_to(z.flatten(), [1.5, 2.0, 1.5, 8 / 3])
    z = reference.suffix_attention(q, k, v, TABLE, one, AttentionRule(1.0, window=2))
    assert_close_to(z.flatten(), [1.5, 2.5, 1.5, 3.5])
    z = reference.suffix_attention(q, k, v, TABLE, one, AttentionRule(1.0, causal=False))
    assert_close_to(z.flatten(), [2.5, 2.5, 3.0, 3.0])
    mask = torch.tensor([[False, False, True, True], [True] * 4])
    z = reference.suffix_attention(q, k, v, TABLE, one, AttentionRule(1.0), mask)
    assert_close_to(z.flatten(), [0.0, 3.0, 1.5, 8 / 3])


def test_scores_by_hand():
    q, k, v = rows(1, 1, 1, 1, 1), rows(0, 0, 0, 0, math.log(3)), rows(1, 1, 1, 1, 5)
    last = [Span(BOTH, 2, 3)]
    z = reference.suffix_attention(q, k, v, TABLE, last, AttentionRule(1.0))
    assert_close_to(z.flatten(), [1.0, (1 + 1 + 3 * 5) / 5])
    z = reference.suffix_attention(q, k, v, TABLE, last, AttentionRule(0.5))
    assert_close_to(z.flatten()[1:], [(1 + 1 + 9 * 5) / 11])
    z = reference.suffix_attention(q, 9 * k, v, TABLE, last, AttentionRule(1.0, soft_cap=1.0))
    capped = math.exp(math.tanh(9 * math.log(3)))
    assert_close_to(z.flatten()[1:], [(2 + capped * 5) / (2 + capped)])
    # One head's ALiBi slope is 2 ** -8.
    z = reference.suffix_attention(q, k, v, TABLE, last, AttentionRule(1.0, alibi=True))
    near, far = math.exp(-(2**-8)), math.exp(-(2**-7))
    assert_close_to(z.flatten()[1:], [(far + near + 15) / (far + near + 3)])


@pytest.mark.parametrize("name", ["causal", "window", "soft_cap", "alibi", "bidirectional"])
def test_it_is_attention_over_keys_laid_out(name):
    rule = {
        "causal": AttentionRule(2.0),
        "window": AttentionRule(2.0, window=3),
        "soft_cap": AttentionRule(2.0, soft_cap=0.5),
        "alibi": AttentionRule(2.0, alibi=True),
        "bidirectional": AttentionRule(2.0, causal=False),
    }[name]
    q, k, v = (torch.randn(40, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    table = torch.randint(0, 40, (3, 7))
    mask = torch.rand(3, 7) < 0.7
    spans = [Span(torch.tensor([2, 0]), 3, 6), Span(torch.tensor([1]), 0, 7)]
    z = reference.suffix_attention(q, k, v, table, spans, rule, mask)
    whole = reference.attention(q[table], k[table], v[table], rule, 0, mask)
    expected = torch.cat([whole[[2, 0], 3:6].flatten(0, 1), whole[1]])
    assert_close_to(z, expected, atol=1e-12)


def test_no_rows():
    q, k, v = (torch.randn(5, heads, 8) for heads in (4, 2, 2))
    assert reference.suffix_attention(q, k, v, TABLE, [], AttentionRule(1.0)).shape == (0, 4, 8)
