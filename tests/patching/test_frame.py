"""What the planner knows, and the budgets of products."""

import pytest

from fastlens.patching.frame import BLOCKS, Blocks, Frame, mask_of, positions_of

SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_mlp": 48}


def frame(**changed):
    wanted = {"n_pos": 6, "first_difference": (2, 3), "needed": (1, 5), "columns": 2, **SIZES}
    return Frame(**{**wanted, **changed})


def test_positions_and_bits():
    assert mask_of((0, 3, 5)) == 0b101001
    assert list(positions_of(0b101001)) == [0, 3, 5] and list(positions_of(0)) == []
    assert frame().needed_mask == 0b100010 and frame().batch == 2


@pytest.mark.parametrize(("causal", "reach"), [(True, 0b111100), (False, 0b111111)])
def test_what_attention_reaches(causal, reach):
    on = frame(is_causal=causal)
    assert on.reach_of(0b010100) == reach and on.reach_of(0) == 0
    scores = sum(p + 1 if causal else 6 for p in (2, 4))
    assert on.scores_of(0b010100) == scores
    assert on.scores_between(2, 5) == on.scores_of(0b011100)


def test_bytes_of_a_row_by_hand():
    # The stream twice, queries and outputs of four heads, keys and values of two, whose they are.
    plain = 4 * (2 * 32 + 2 * 32 + 2 * 16) + 128
    assert frame().row_bytes == plain
    # Rotated queries and keys beside those before.
    assert frame(is_rotary=True).row_bytes == plain + 4 * (32 + 16)
    assert frame().joining_bytes == 4 * (32 + 2 * 16)
    assert frame().hidden_bytes == 4 * 2 * 48 and frame(is_gated=True).hidden_bytes == 4 * 3 * 48
    assert frame(itemsize=2).hidden_bytes == 2 * 2 * 48
    assert frame(is_gated=True, d_shared=60).hidden_bytes == 4 * 3 * 60
    assert frame(n_pos=600).branch_bytes > 8 * 600


def test_what_products_hold():
    blocks = Blocks(hidden=100, pattern=10, logits=60, codes=1000)
    assert blocks.largest(10**9, 10**9, False, False) == 200
    assert blocks.largest(30, 10**9, False, False) == 90
    assert blocks.largest(30, 20, True, False) == 60
    assert blocks.largest(1, 1, True, True) == 2000
    assert BLOCKS.largest(10**12, 10**12, True, True) == 96 * 2**20
