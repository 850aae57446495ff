"""The visibility rule, cell by cell against its definition."""

import itertools

import pytest
import torch

from fastlens.kernels.masks import (
    AttentionRule,
    alibi_slopes,
    visibility,
    visible_keys,
    with_lengths,
)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("offset", [0, 4])
def test_visibility_equals_its_definition(causal, window, offset):
    rule = AttentionRule(1.0, causal, window)
    n_queries, n_keys = 5, 5 + offset
    key_mask = torch.ones(2, n_keys, dtype=torch.bool)
    key_mask[1, :2] = False
    queries, keys = torch.arange(offset, offset + n_queries), torch.arange(n_keys)
    visible = visibility(rule, queries, keys, key_mask)
    for b, i, j in itertools.product(range(2), range(n_queries), range(n_keys)):
        q = i + offset
        wanted = bool(key_mask[b, j])
        wanted &= not causal or j <= q
        wanted &= window is None or j > q - window
        assert bool(visible[b, 0, i, j]) == wanted
    low, high = visible_keys(rule, n_keys, offset, offset + n_queries)
    outside = torch.ones(n_keys, dtype=torch.bool)
    outside[low:high] = False
    assert not visible[..., outside].any()


def test_nothing_to_mask_is_none():
    rule = AttentionRule(1.0, causal=False)
    assert visibility(rule, torch.arange(3), torch.arange(3), None) is None


def test_alibi_slopes_of_eight_heads_are_powers_of_one_half():
    slopes = alibi_slopes(8, torch.device("cpu"), torch.float64)
    assert torch.allclose(slopes, torch.tensor([2.0**-n for n in range(1, 9)], dtype=torch.float64))


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 12, 16, 71, 112])
def test_alibi_slopes_are_those_of_bloom_and_mpt(n_heads):
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    slopes = alibi_slopes(n_heads, torch.device("cpu"), torch.float32)
    bloom = _get_alibi_slopes(n_heads, torch.device("cpu"))
    mpt = -build_mpt_alibi_tensor(n_heads, 2)[:, 0, 0]
    # They raise float32 numbers to powers.
    assert torch.allclose(slopes, bloom, rtol=2e-6, atol=0)
    assert torch.allclose(slopes, mpt, rtol=2e-6, atol=0)


def test_alibi_slopes_between_powers_of_two():
    slopes = alibi_slopes(6, torch.device("cpu"), torch.float64)
    assert slopes.tolist() == [2.0**-n for n in (2, 4, 6, 8, 1, 3)]


def test_lengths_hide_the_keys_behind_them():
    lengths = torch.tensor([0, 2, 5])
    counted = with_lengths(None, lengths, 3)
    assert counted.tolist() == [[False] * 3, [True, True, False], [True] * 3]
    mask = torch.tensor([[True, False, True]]).expand(3, -1)
    assert torch.equal(with_lengths(mask, lengths, 3), counted & mask)
    assert with_lengths(mask, None, 3) is mask and with_lengths(None, None, 3) is None
