"""Packed rows: the table always points at the right one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlens.patching.pack import Pack, Span, regrouped, spans_of

BATCH, T = 2, 5


def pack_of(own, example=None):
    """A pack of two base runs and further branches with these rows of their own."""
    rows = torch.zeros(BATCH + len(own), T, dtype=torch.bool)
    rows[:BATCH] = True
    for branch, positions in enumerate(own):
        rows[BATCH + branch, list(positions)] = True
    of = [i % BATCH for i in range(len(own))] if example is None else example
    return Pack.of(torch.tensor([*range(BATCH), *of], dtype=torch.long), rows, BATCH)


def check(pack, base_is_whole=True):
    """Every place leads to its own row where it has one, else to its base run's."""
    for branch in range(len(pack.example)):
        for t in range(T):
            row = int(pack.table[branch, t])
            whose = branch if pack.own[branch, t] else int(pack.example[branch])
            if pack.own[whose, t]:
                assert (int(pack.branch[row]), int(pack.pos[row])) == (whose, t)
            else:
                assert row == -1 and not base_is_whole
    assert len(pack) == len(pack.pos) == int(pack.own.sum())


def test_a_new_pack():
    pack = pack_of([{3, 4}, set(), {0}])
    check(pack)
    assert len(pack) == 2 * T + 3
    # Base rows stand in front, so that their numbers are the places of a [batch, pos] tensor.
    assert pack.table[:BATCH].flatten().tolist() == list(range(2 * T))
    assert pack.branch[2 * T :].tolist() == [2, 2, 4]
    assert pack.pos[2 * T :].tolist() == [3, 4, 0]


def test_only_base_runs():
    pack = pack_of([])
    check(pack)
    assert len(pack) == 2 * T


def test_missing_rows_start_as_copies_of_what_was_there():
    pack = pack_of([{3, 4}, {1}])
    x = torch.arange(float(len(pack)))
    wanted = torch.zeros_like(pack.own)
    wanted[2, [0, 3]] = True
    wanted[3, 4] = True
    copied = pack.missing(wanted)
    check(pack)
    # Branch 2 is of example 0 and owns row 3 already; branch 3 is of example 1.
    assert copied.tolist() == [0, T + 4]
    grown = torch.cat([x, x[copied]])
    assert grown[pack.table[2]].tolist()[0] == x[0] and grown[pack.table[3, 4]] == x[T + 4]
    assert pack.missing(wanted).tolist() == []


def test_a_mask_of_entries():
    pack = pack_of([set(), set()])
    mask = pack.mask(torch.tensor([2, 3, 2]), torch.tensor([0, 1, 0]))
    assert mask.nonzero().tolist() == [[2, 0], [3, 1]]


def spans(rows):
    wanted = torch.zeros(len(rows), T, dtype=torch.bool)
    for branch, positions in enumerate(rows):
        wanted[branch, list(positions)] = True
    return [(span.branches.tolist(), span.start, span.stop) for span in spans_of(wanted)]


def test_spans_are_neighbouring_positions_of_branches_with_one_extent():
    assert spans([range(T), {3, 4}, {2, 3, 4}, {3, 4}]) == [
        ([0], 0, T),
        ([2], 2, T),
        ([1, 3], 3, T),
    ]


def test_spans_with_gaps():
    assert spans([{0, 2, 3}, {0}, {4}, set(), {0, 2, 3, 4}]) == [
        ([0, 1, 4], 0, 1),
        ([0], 2, 4),
        ([4], 2, T),
        ([2], 4, T),
    ]


def test_no_spans():
    assert spans([set(), set()]) == []


def test_regrouped_rows_and_where_they_come_from():
    pack = pack_of([{3, 4}, {1}])
    some = [Span(torch.tensor([0, 2]), 3, T), Span(torch.tensor([3]), 4, T)]
    new, copied = regrouped(pack, some, BATCH)
    assert new.branch.tolist() == [0, 0, 2, 2, 3]
    assert new.pos.tolist() == [3, 4, 3, 4, 4]
    # Branch 3 had no row 4 of its own: it starts from its base run's.
    assert copied.tolist() == [3, 4, int(pack.table[2, 3]), int(pack.table[2, 4]), T + 4]
    check(new, base_is_whole=False)
    assert new.table[1].tolist() == [-1] * T
    assert new.table[3].tolist() == [-1, -1, -1, -1, 4]


ROWS = st.sets(st.integers(0, T - 1))


@settings(max_examples=100)
@given(
    st.lists(st.tuples(ROWS, ROWS, ROWS, st.integers(0, BATCH - 1)), max_size=5),
    st.lists(ROWS, min_size=BATCH, max_size=BATCH),
)
def test_values_follow_their_rows(branches, kept_of_base):
    """A value written at every own place, through growing and regrouping, against a dict."""
    pack = pack_of([own for own, _, _, _ in branches], [one for *_, one in branches])
    n_branches = BATCH + len(branches)
    x = torch.arange(float(len(pack)))
    values = {}
    for branch in range(n_branches):
        for t in range(T):
            values[branch, t] = float(x[pack.table[branch, t]])
    check(pack)

    wanted = torch.zeros(n_branches, T, dtype=torch.bool)
    for branch, (_, more, _, _) in enumerate(branches):
        wanted[BATCH + branch, list(more)] = True
    copied = pack.missing(wanted)
    x = torch.cat([x, x[copied]])
    check(pack)
    # Copies are equal until they are written to; then nobody else changes.
    assert values == {place: float(x[pack.table[place]]) for place in values}
    for branch, t in wanted.nonzero().tolist():
        values[branch, t] += 1000.0 * branch
        x[pack.table[branch, t]] += 1000.0 * branch
    assert values == {place: float(x[pack.table[place]]) for place in values}

    # What is left out of the spans may not be asked for any more, own rows of branches included.
    kept = torch.zeros(n_branches, T, dtype=torch.bool)
    for branch, positions in enumerate(kept_of_base):
        kept[branch, list(positions)] = True
    for branch, (_, _, later, _) in enumerate(branches):
        kept[BATCH + branch] = pack.own[BATCH + branch]
        kept[BATCH + branch, list(later)] = True
    found = spans_of(kept)
    if not found:
        return
    for span in found:
        inside = kept[span.branches, span.start : span.stop]
        assert bool(inside.all())
    assert sum((s.stop - s.start) * len(s.branches) for s in found) == int(kept.sum())
    new, copied = regrouped(pack, found, BATCH)
    x = x[copied]
    check(new, base_is_whole=False)
    for place, value in values.items():
        row = int(new.table[place])
        base_is_kept = bool(kept[int(new.example[place[0]]), place[1]])
        assert (row >= 0) == (bool(kept[place]) or base_is_kept)
        if row >= 0:
            assert float(x[row]) == value
