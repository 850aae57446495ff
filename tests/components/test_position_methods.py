"""Tables of positions as methods; compared with TransformerLens in tests/compat/calls/parts.py."""

import pytest
import torch

from fastlens.components.attention import Attention
from fastlens.components.position_methods import PositionMethods
from fastlens.config import HookedTransformerConfig
from tests.close import assert_close_to
from tests.configs import tiny


@pytest.mark.parametrize("adjacent", [False, True])
def test_rotary_from_the_methods_is_apply_rotary(adjacent):
    cfg = HookedTransformerConfig(
        **tiny("neox", rotary_dim=8, rotary_adjacent_pairs=adjacent, rotary_base=500)
    )
    attn = Attention(cfg, "global", 0)
    x = torch.randn(2, 6, 4, 8, generator=torch.Generator().manual_seed(0))
    sin, cos = attn.calculate_sin_cos_rotary(8, 6, base=500)
    by_hand = x * cos[:, None] + attn.rotate_every_two(x) * sin[:, None]
    assert_close_to(by_hand, attn.apply_rotary(x), atol=1e-6)
    assert attn.calculate_sin_cos_rotary(8, 6, dtype=torch.float64)[0].dtype == torch.float64
    assert cfg.rotary_base == 500 and cfg.rotary_dim == 8


def test_turning_twice_is_minus_one():
    x = torch.arange(8.0)
    attn = Attention(HookedTransformerConfig(**tiny("neox")), "global", 0)
    assert torch.equal(attn.rotate_every_two(attn.rotate_every_two(x)), -x)


def test_alibi_of_four_heads():
    slopes = PositionMethods.create_alibi_multipliers(4)
    assert slopes.tolist() == [0.25, 0.0625, 0.015625, 0.00390625]
    distance = PositionMethods.create_alibi_slope(3)
    assert distance.tolist() == [[0, 0, 0], [-1, 0, 0], [-2, -1, 0]]
    bias = PositionMethods.create_alibi_bias(4, 3, device="cpu")
    assert torch.equal(bias, slopes[:, None, None] * distance)
