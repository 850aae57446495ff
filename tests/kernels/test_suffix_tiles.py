"""Which program of the suffix kernel has which rows and keys, by hand and by what must hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlens.kernels import suffix_tiles
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.suffix_tiles import longest_piece, tiles_of

CAUSAL = AttentionRule(1.0)
# Two runs of four positions, and branches of the first from position 2 and 3 on.
BASE = [0, 1, 2, 3]
OTHER = [4, 5, 6, 7]
TABLE = np.array([BASE, OTHER, [0, 1, 8, 9], [0, 1, 10, 11], [0, 1, 2, 12]])


def span(branches, start, stop):
    return np.array(branches, np.int64), start, stop


def test_rows_of_branches_with_one_prefix_share_it():
    shared, own = tiles_of(TABLE, [span([2, 3], 2, 4)], CAUSAL, (8, 8), state_cost=0)
    # Rows of one position together: output rows 0 and 2 are position 2 of either branch.
    assert shared.entries.tolist() == [[0, 8, 2], [2, 10, 2], [1, 9, 3], [3, 11, 3]]
    assert shared.tiles.tolist() == [[0, 4, 2, 0, 2]]
    assert own.entries.tolist() == [[0, 8, 2], [1, 9, 3], [2, 10, 2], [3, 11, 3]]
    assert own.tiles.tolist() == [[0, 2, 2, 2, 4], [2, 2, 3, 2, 4]]


def test_ragged_branches_share_what_all_of_them_have():
    spans = [span([2, 3], 2, 4), span([4], 3, 4)]
    shared, own = tiles_of(TABLE, spans, CAUSAL, (8, 8), state_cost=0)
    assert shared.tiles.tolist() == [[0, 5, 4, 0, 2]]
    assert own.tiles[:, 2:].tolist() == [[2, 2, 4], [3, 2, 4], [4, 2, 4]]


def test_a_range_is_split_where_its_parts_share_more():
    # Two and two branches with a long prefix each, and one key that all four have.
    first, second = list(range(20)), [0, *range(20, 39)]
    table = np.array([[*first, 40], [*first, 41], [*second, 42], [*second, 43]])
    shared, own = tiles_of(table, [span(range(4), 20, 21)], CAUSAL, (8, 8), state_cost=0)
    assert [tile[2:] for tile in shared.tiles.tolist()] == [[0, 0, 20], [2, 0, 20]]
    assert shared.tiles[:, :2].tolist() == [[0, 2], [2, 2]]
    assert own.tiles[:, 3:].tolist() == [[20, 21]] * 4


def test_nothing_is_shared_where_it_saves_too_little():
    spans = [span([2, 3], 2, 4)]
    shared, own = tiles_of(TABLE, spans, CAUSAL, (8, 8), state_cost=3)
    assert not len(shared.tiles) and not len(shared.entries)
    assert own.tiles.tolist() == [[0, 2, 2, 0, 4], [2, 2, 3, 0, 4]]
    alone, _ = tiles_of(TABLE, [span([0], 0, 4)], CAUSAL, (8, 8), state_cost=0)
    assert not len(alone.tiles)
    # Of full tiles each reads the prefix for itself anyway.
    full, _ = tiles_of(TABLE, spans, CAUSAL, (2, 2), state_cost=0)
    assert not len(full.tiles)


def test_a_window_cuts_keys_off_on_the_left():
    rule = AttentionRule(1.0, window=2)
    table = np.array([[*range(10), 20 + i] for i in range(3)])
    shared, own = tiles_of(table, [span(range(3), 9, 11)], rule, (3, 2), state_cost=0)
    # Position 9 sees 8 and 9, position 10 sees 9 and itself.
    assert shared.tiles.tolist() == [[0, 3, 0, 8, 10], [3, 3, 0, 9, 10]]
    assert own.tiles[:, 3:].tolist() == [[10, 11]] * 3
    _, wide = tiles_of(table, [span([0], 9, 11)], rule, (3, 2), state_cost=0)
    assert wide.tiles.tolist() == [[0, 2, 0, 8, 11]]


def test_a_window_that_ends_behind_the_prefix_leaves_no_shared_tile():
    rule = AttentionRule(1.0, window=1)
    table = np.array([[*range(10), 20 + i, 30 + i] for i in range(3)])
    shared, own = tiles_of(table, [span(range(3), 10, 12)], rule, (8, 8), state_cost=-100)
    assert not len(shared.tiles)
    assert own.tiles[:, 3:].tolist() == [[10, 12]] * 3


def test_not_causal_rows_see_every_column():
    rule = AttentionRule(1.0, causal=False)
    shared, own = tiles_of(TABLE, [span([2, 3], 2, 3)], rule, (8, 8), state_cost=0)
    assert shared.tiles[:, 3:].tolist() == [[0, 2]]
    assert own.tiles[:, 3:].tolist() == [[2, 4], [2, 4]]
    changed_first = np.array([[4, 1, 2], [5, 1, 2]])
    shared, own = tiles_of(changed_first, [span([0, 1], 0, 1)], rule, (8, 8), state_cost=0)
    assert not len(shared.tiles) and own.tiles[:, 3:].tolist() == [[0, 3], [0, 3]]


def test_a_prefix_that_is_masked_otherwise_is_another():
    mask = np.ones(TABLE.shape, bool)
    mask[3, 1] = False
    shared, _ = tiles_of(TABLE, [span([2, 3], 2, 4)], CAUSAL, (8, 8), mask, state_cost=0)
    assert shared.tiles[:, 3:].tolist() == [[0, 1]]


def test_rows_are_cut_into_blocks():
    table = np.arange(10)[None]
    _, own = tiles_of(table, [span([0], 0, 10)], CAUSAL, (4, 4))
    assert own.tiles.tolist() == [[0, 4, 0, 0, 4], [4, 4, 0, 0, 8], [8, 2, 0, 0, 10]]


def test_nothing_wanted():
    for spans in ([], [span([], 1, 3)], [span([0], 2, 2)]):
        shared, own = tiles_of(TABLE, spans, CAUSAL, (8, 8))
        assert [len(array) for tiles in (shared, own) for array in tiles] == [0] * 4
        assert longest_piece(spans) == 0
    assert longest_piece([span([], 0, 9), span([1], 1, 4)]) == 3


# -- what must hold of any tiles ---------------------------------------------------------------


def keys_of(tiles, rule):
    """For each output row the keys it gets, one by one, as its packed rows' branch and position."""
    found: dict[int, list[tuple[int, int]]] = {}
    for first, count, branch, low, high in tiles.tiles.tolist():
        assert count > 0
        for out_row, _, pos in tiles.entries[first : first + count].tolist():
            seen = [
                key
                for key in range(low, high)
                if (not rule.causal or key <= pos)
                and (rule.window is None or key > pos - rule.window)
            ]
            found.setdefault(out_row, []).extend((branch, key) for key in seen)
    return found


def check(table, spans, rule, blocks, mask, state_cost):
    shared, own = tiles_of(table, spans, rule, blocks, mask, state_cost)
    wanted = [
        (b, pos) for branches, start, stop in spans for b in branches for pos in range(start, stop)
    ]
    assert [tuple(entry) for entry in own.entries.tolist()] == [
        (i, table[b, pos], pos) for i, (b, pos) in enumerate(wanted)
    ]
    assert set(map(tuple, shared.entries.tolist())) <= set(map(tuple, own.entries.tolist()))
    first, second = keys_of(shared, rule), keys_of(own, rule)
    # The second launch writes every row once.
    covered = [
        row for first_, count, *_ in own.tiles.tolist() for row in range(first_, first_ + count)
    ]
    assert sorted(covered) == list(range(len(wanted)))
    for row, (branch, pos) in enumerate(wanted):
        every = first.get(row, []) + second.get(row, [])
        seen = [
            key
            for key in range(table.shape[1])
            if (not rule.causal or key <= pos) and (rule.window is None or key > pos - rule.window)
        ]
        assert sorted(key for _, key in every) == seen, (row, branch, pos)
        assert all(table[read, key] == table[branch, key] for read, key in every)
        if mask is not None:
            assert all(mask[read, key] == mask[branch, key] for read, key in every)
    for tiles, block in ((shared, blocks[0]), (own, blocks[1])):
        assert all(count <= block for count in tiles.tiles[:, 1].tolist())
    return len(shared.tiles)


@st.composite
def cases(draw):
    n_pos, n_runs, n_branches = draw(st.integers(1, 9)), 2, draw(st.integers(1, 6))
    table = np.arange(n_runs * n_pos).reshape(n_runs, n_pos)
    new = table.size
    for _ in range(n_branches):
        branch = table[draw(st.integers(0, len(table) - 1))].copy()
        start = draw(st.integers(0, n_pos - 1))
        stop = draw(st.integers(start, n_pos))
        branch[start:stop] = np.arange(new, new + stop - start)
        new += stop - start
        table = np.concatenate([table, branch[None]])
    spans = []
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, n_pos))
        stop = draw(st.integers(start, n_pos))
        spans.append(span(draw(st.lists(st.integers(0, len(table) - 1), max_size=5)), start, stop))
    window = draw(st.sampled_from([None, 1, 3]))
    rule = AttentionRule(1.0, draw(st.booleans()), window)
    blocks = draw(st.sampled_from([(1, 1), (3, 2), (16, 16), (4, 16)]))
    mask = None
    if draw(st.booleans()):
        mask = np.random.default_rng(draw(st.integers(0, 9))).random(table.shape) < 0.8
    return table, spans, rule, blocks, mask, draw(st.sampled_from([-20, 0, 3]))


@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_every_row_gets_each_key_it_sees_once(case):
    check(*case)


MISTAKES = {
    "a key too few of the prefix": ("tile[:, 4] -= 1", "shared"),
    "a key too many of the prefix": ("tile[:, 4] += 1", "shared"),
    "own keys one late": ("tile[:, 3] += 1", "own"),
    "own keys one early": ("tile[:, 3] -= 1", "own"),
    "another branch's keys": ("tile[:, 2] += 1", "shared"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(monkeypatch, mistake):
    edit, which = MISTAKES[mistake]
    right = suffix_tiles.tiles_of

    def wrong(*args, **kwargs):
        made = dict(zip(("shared", "own"), right(*args, **kwargs), strict=True))
        exec(edit, {"tile": made[which].tiles})
        return made["shared"], made["own"]

    # The second branch of the shared tile has another first key, so that reading it is wrong.
    table = np.array([[0, 1, 8, 9], [4, 1, 12, 13], [0, 1, 10, 11]])
    case = table, [span([0, 2], 2, 4)], CAUSAL, (8, 8), None, 0
    assert check(*case) == 1
    monkeypatch.setitem(globals(), "tiles_of", wrong)
    with pytest.raises(AssertionError):
        check(*case)
