"""The specification against cases worked out by hand."""

import math

import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule


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
