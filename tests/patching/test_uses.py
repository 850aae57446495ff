"""Which entries a chunk patches, as arrays, against the patches themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlens.patching.frame import Frame
from fastlens.patching.plan import plan_runs
from fastlens.patching.runs import PlannedPatch, Run
from fastlens.patching.sites import BY_ENTRY, SITES
from fastlens.patching.uses import uses_of

L, T, H, KV = 3, 6, 4, 2


def frame(first=(3,), needed=(T - 1,), **changes) -> Frame:
    fields = {
        "n_layers": L,
        "n_pos": T,
        "first_difference": tuple(first),
        "needed": tuple(needed),
        "d_model": 32,
        "n_heads": H,
        "n_kv_heads": KV,
        "d_head": 8,
        "d_mlp": 48,
        "columns": 2,
    }
    return Frame(**(fields | changes))


def patch(site, layer, pos=None, columns=None, keys=None, value=0, mode="replace"):
    return PlannedPatch(site, layer, pos, columns, keys, value, mode)


def used(*runs, on=None):
    """The plan of runs in one chunk, and what the chunk patches."""
    listed = [(one,) if isinstance(one, PlannedPatch) else tuple(one) for one in runs]
    made = [Run((i,), patches) for i, patches in enumerate(listed)]
    plan = plan_runs(frame() if on is None else on, made)
    return plan, uses_of(plan, plan.chunks[0])


def at(use, site, layer):
    return use.entries.get((layer, SITES[site].stage), {}).get(site, [])


def listed(array):
    return None if array is None else array.tolist()


# -- branches ------------------------------------------------------------------------------------


def test_a_branch_for_each_run_and_each_example_it_changes():
    on = frame(first=(1, 4, T))
    plan, use = used(patch("z", 0, (2,)), patch("z", 0, (5,)), patch("z", 1), on=on)
    branch_of = dict(zip(plan.chunks[0].runs, use.branch_of.tolist(), strict=True))
    # The third pair does not differ; the second not yet at position 2.
    assert [branch >= 0 for branch in branch_of[0]] == [True, False, False]
    assert [branch >= 0 for branch in branch_of[1]] == [True, True, False]
    assert [branch >= 0 for branch in branch_of[2]] == [True, True, False]
    numbers = sorted(b for row in branch_of.values() for b in row if b >= 0)
    assert numbers == list(range(5)) == list(range(len(use.example)))
    for row in branch_of.values():
        assert [use.example[b] for b in row if b >= 0] == [i for i, b in enumerate(row) if b >= 0]


def test_branches_of_one_start_lie_together():
    """Over runs, and over examples whose pairs begin to differ at different places."""
    first = (4, 1, 3)
    runs = [patch("z", 0, None, (head,)) for head in range(H)]
    plan, use = used(*runs, on=frame(first=first))
    assert use.branch_of.shape == (H, 3) and (use.branch_of >= 0).all()
    starts = [first[example] for example in use.example]
    assert starts == sorted(starts) and len(starts) == 3 * H


def test_runs_that_change_nothing_in_an_example_are_its_base_run():
    # Position 4 of the last layer is not read, so only the first example's k patch matters.
    on = frame(first=(1, 4))
    both = [patch("k", L - 1, (2,)), patch("mlp_out", L - 1, (4,), value=1)]
    plan, use = used(both, on=on)
    assert use.branch_of.tolist() == [[0, -1]]
    assert use.example.tolist() == [0]
    assert at(use, "mlp_out", L - 1) == []
    assert plan.why_not == {}


# -- entries -------------------------------------------------------------------------------------


def test_whole_rows():
    _, use = used(patch("resid_pre", 1, (3, 5)), patch("resid_pre", 1, (4,)))
    (entries,) = [e for e in at(use, "resid_pre", 1) if e.selected[0] == 2]
    assert (listed(entries.pos), listed(entries.column)) == ([3, 5], None)
    assert (entries.selected, entries.keys, entries.value, entries.mode) == (
        (2, None, None),
        None,
        0,
        "replace",
    )
    assert len(set(listed(entries.branch))) == 1


def test_positions_the_other_prompt_leaves_alone_are_left_out():
    _, use = used(patch("z", 1, None, (2,)), patch("z", 0, (1, 4), (0, 3)))
    (every,) = at(use, "z", 1)
    # Ranks count the patch's own selection: a tensor source has a value for each of it.
    assert listed(every.pos) == listed(every.pos_rank) == [3, 4, 5]
    assert listed(every.column) == [2, 2, 2] and listed(every.column_rank) == [0, 0, 0]
    (some,) = at(use, "z", 0)
    assert listed(some.pos) == [4, 4] and listed(some.pos_rank) == [1, 1]
    assert listed(some.column) == [0, 3] and listed(some.column_rank) == [0, 1]
    assert some.selected == (2, 2, None)


def test_ranks_follow_a_selection_that_is_not_sorted():
    _, use = used(patch("z", 1, (5, 3, 4), (3, 1), value=1))
    (entries,) = at(use, "z", 1)
    assert listed(entries.pos) == [3, 3, 4, 4, 5, 5]
    assert listed(entries.pos_rank) == [1, 1, 2, 2, 0, 0]
    assert listed(entries.column) == [3, 1] * 3
    assert listed(entries.column_rank) == [0, 1] * 3


@pytest.mark.parametrize("site", sorted(BY_ENTRY))
def test_sites_made_entry_by_entry_name_every_head(site):
    _, use = used(patch(site, 0, (4,)))
    (entries,) = at(use, site, 0)
    heads = KV if SITES[site].is_per_kv_head else H
    assert listed(entries.column) == listed(entries.column_rank) == list(range(heads))
    assert entries.selected == (1, None, None)


def test_what_lies_behind_the_last_position_read_is_left_out():
    on = frame(first=(1,), needed=(3,), n_pos=4)
    _, use = used(patch("z", 0, (2, 5)), patch("resid_pre", 0, None), on=on)
    (entries,) = at(use, "z", 0)
    assert listed(entries.pos) == [2] and entries.selected == (2, None, None)
    (entries,) = at(use, "resid_pre", 0)
    assert listed(entries.pos) == [1, 2, 3]


def test_one_site_patched_twice_in_a_run_is_patched_in_two_goes():
    add = patch("z", 1, None, (2,), value=1, mode="add")
    scale = patch("z", 1, (4, 5), value=1, mode="scale")
    for first, second in [(add, scale), (scale, add)]:
        _, use = used([first, second], [second])
        goes = at(use, "z", 1)
        of_both = [entries.mode for entries in goes if use.branch_of[0, 0] in entries.branch]
        assert of_both == [first.mode, second.mode]
        for entries in goes:
            places = list(zip(*(listed(a) for a in (entries.branch, entries.pos)), strict=True))
            if entries.column is not None:
                places = [(*p, c) for p, c in zip(places, listed(entries.column), strict=True)]
            assert len(set(places)) == len(places)


def test_runs_that_patch_in_two_orders_do_not_share_their_goes():
    add = patch("z", 1, None, (2,), value=1, mode="add")
    scale = patch("z", 1, None, (2,), value=1, mode="scale")
    replace = patch("z", 1, None, (2,), value=1)
    plan, use = used([add, scale], [scale, add], [add, add], [replace, scale])
    orders = {}
    for entries in at(use, "z", 1):
        for branch in set(listed(entries.branch)):
            orders.setdefault(branch, []).append(entries.mode)
    of_run = dict(zip(plan.chunks[0].runs, use.branch_of[:, 0].tolist(), strict=True))
    assert [orders[of_run[run]] for run in range(4)] == [
        ["add", "scale"],
        ["scale", "add"],
        ["add", "add"],
        ["replace", "scale"],
    ]


def test_runs_that_patch_alike_go_together():
    runs = [patch("z", 1, None, (head,)) for head in range(H)]
    runs += [patch("resid_pre", 1, (pos,)) for pos in (3, 4, 5)]
    _, use = used(*runs)
    assert len(at(use, "z", 1)) == len(at(use, "resid_pre", 1)) == 1
    (entries,) = at(use, "z", 1)
    assert len(entries.branch) == H * 3


@pytest.mark.parametrize(
    "other",
    [
        patch("pattern", 1, (4,), (0,), (1,), value=1),
        patch("pattern", 1, (4,), (0,), (0,)),
        patch("pattern", 1, (4,), (0,), None, value=1),
        patch("pattern", 1, (4,), (0,), (0,), value=1, mode="add"),
        patch("pattern", 1, (4, 5), (0,), (0,), value=1),
    ],
)
def test_runs_that_patch_otherwise_do_not(other):
    _, use = used(patch("pattern", 1, (4,), (0,), (0,), value=1), other)
    assert len(at(use, "pattern", 1)) == 2


def test_only_some_entries():
    _, use = used(patch("z", 1, None, (1, 2)), patch("resid_pre", 1))
    (entries,) = at(use, "z", 1)
    some = entries.only(np.array([False, True] * 3))
    assert (listed(some.pos), listed(some.column)) == ([3, 4, 5], [2, 2, 2])
    assert (listed(some.pos_rank), listed(some.column_rank)) == ([3, 4, 5], [1, 1, 1])
    assert (some.selected, some.mode) == (entries.selected, entries.mode)
    (whole,) = at(use, "resid_pre", 1)
    assert whole.only(np.array([True, False, False])).column is None


def test_aliases_are_patched_where_the_stream_enters():
    _, use = used(patch("resid_post", 0, (4,)), patch("resid_post", L - 1, (5,)))
    assert set(use.entries) == {
        (1, SITES["resid_pre"].stage),
        (L - 1, SITES["resid_post"].stage),
    }


# -- any patches ---------------------------------------------------------------------------------

POSITIONS = st.none() | st.lists(st.integers(0, T - 1), min_size=1, max_size=3, unique=True)
HEADS = st.none() | st.lists(st.integers(0, KV - 1), min_size=1, max_size=2, unique=True)
FIELDS = st.tuples(
    st.sampled_from(["resid_pre", "q", "k", "pattern", "z", "result", "mlp_out", "resid_post"]),
    st.integers(0, L - 1),
    POSITIONS,
    HEADS,
    st.sampled_from([0, 0, 1]),
    st.sampled_from(["replace", "add"]),
)


@settings(max_examples=100)
@given(
    st.lists(st.lists(FIELDS, min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(0, T), min_size=1, max_size=2),
)
def test_applied_one_after_the_other_they_are_the_patches(runs, first):
    """A note of every patch in every entry, made by the arrays, equals one made patch by patch."""
    made = []
    for patches in runs:
        made.append([])
        for site, layer, pos, heads, value, mode in patches:
            in_heads = "head" in SITES[site].axes
            columns = tuple(heads) if heads and in_heads else None
            index = None if pos is None else tuple(pos)
            made[-1].append(patch(site, layer, index, columns, None, value, mode))
    on = frame(first=first)
    planned = [Run((i,), tuple(patches)) for i, patches in enumerate(made)]
    plan = plan_runs(on, planned)
    if not plan.chunks:
        return
    use = uses_of(plan, plan.chunks[0])
    found, expected = {}, {}
    for (layer, _), sites in use.entries.items():
        for site, goes in sites.items():
            for e in goes:
                for i in range(len(e.branch)):
                    column = None if e.column is None else int(e.column[i])
                    place = int(e.branch[i]), layer, site, int(e.pos[i]), column
                    ranks = int(e.pos_rank[i]), column and int(e.column_rank[i])
                    found.setdefault(place, []).append((e.value, e.mode, ranks))
    for number, branches in zip(plan.chunks[0].runs, use.branch_of.tolist(), strict=True):
        for example, branch in enumerate(branches):
            if branch < 0:
                continue
            assert use.example[branch] == example
            for place, note in noted(on, plan.patches[number], first[example]):
                expected.setdefault((branch, *place), []).append(note)
    flattened = {key: value for key, value in found.items() if key[-1] is not None}
    whole = {key: value for key, value in found.items() if key[-1] is None}
    assert {**flattened, **whole} == expected


def noted(on, patches, first):
    """Every entry that each patch changes, patch by patch."""
    touched = T
    for p in patches:
        heads = KV if SITES[p.site].is_per_kv_head else H
        columns = p.columns
        if columns is None:
            columns = range(heads) if p.site in BY_ENTRY else [None]
        live = []
        for t in range(T):
            if p.pos is not None and t not in p.pos:
                continue
            if p.value == 0 and p.mode == "replace" and t < first and t < touched:
                continue
            if p.layer == L - 1 and SITES[p.site].reach in ("row", "query") and t not in on.needed:
                continue
            live.append(t)
            for rank, column in enumerate(columns):
                at_pos = t if p.pos is None else p.pos.index(t)
                note = p.value, p.mode, (at_pos, column and rank)
                yield (p.layer, p.site, t, column), note
        touched = min([touched, *live])
