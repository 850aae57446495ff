"""Which order is chosen: by weights read again and rows written and read."""

import itertools
import json

import pytest

from fastlens.errors import SweepError
from fastlens.patching.frame import Frame
from fastlens.patching.plan import plan_runs
from fastlens.patching.runs import runs_of
from fastlens.patching.sites import SITES
from fastlens.patching.traffic import (
    BY_CHUNK,
    BY_LAYER,
    IN_MEMORY,
    ON_DISK,
    ON_HOST,
    Means,
    Passes,
    alone,
    cut_and_ordered,
    groups_within,
)
from tests.patching.budgets import memory_for_rows

L, T = 4, 12


def made(d_model=64, site="resid_pre"):
    frame = Frame(
        n_layers=L, n_pos=T, first_difference=(1,), needed=(T - 1,), d_model=d_model, n_heads=2,
        n_kv_heads=2, d_head=d_model // 2, d_mlp=2 * d_model, columns=2,
    )  # fmt: skip
    indices = {"layer": range(L), "pos": range(T)}
    return plan_runs(frame, runs_of(SITES[site], ("layer", "pos"), indices, {}, n_layers=L))


def test_weights_in_memory_cost_nothing_to_read_again():
    plan = made()
    passes = cut_and_ordered(plan, memory_for_rows(plan, 15), Means())
    assert len(plan.chunks) > 5
    assert passes == alone(plan) and passes.order == BY_CHUNK
    assert passes.held == plan.peak_bytes()
    assert passes.summary() == {} and passes.lines() == []


def test_one_chunk_reads_no_weights_again():
    plan = made()
    passes = cut_and_ordered(plan, 2**31, Means((10**9,) * L, ON_DISK, 10**12))
    assert passes.groups == ((0,),) and not passes.choices


def test_large_weights_are_shared_and_small_ones_are_read_again():
    small, large = made(), made()
    memory = memory_for_rows(small, 15)
    few = cut_and_ordered(small, memory, Means((10,) * L, ON_DISK, 10**12))
    many = cut_and_ordered(large, memory, Means((10**9,) * L, ON_DISK, 10**12))
    assert few.order == BY_CHUNK and few.choices[0].rows == 0
    assert many.order == BY_LAYER and many.choices[0].weights == 0
    assert len(many.groups) == 1
    # Both prices of both ways are said.
    for passes in (few, many):
        assert {choice.order for choice in passes.choices} == {BY_CHUNK, BY_LAYER}
        prices = [choice.weights + choice.rows for choice in passes.choices]
        assert prices[0] == min(prices)
    assert json.loads(json.dumps(many.record())) == json.loads(json.dumps(many.record()))
    assert Passes.of_record(json.loads(json.dumps(many.record()))) == many


def test_weights_read_again_by_hand():
    plan = made()
    weights = (1, 10, 100, 1000)
    passes = cut_and_ordered(plan, memory_for_rows(plan, 15), Means(weights, ON_DISK, 0))
    by_chunk = next(choice for choice in passes.choices if choice.order == BY_CHUNK)
    plan.split(memory_for_rows(plan, 15))
    total = begun = 0
    for chunk in plan.chunks:
        total += sum(weights[begun:])
        begun = chunk.first_layer
    assert by_chunk.weights == total - sum(weights) > 0


def test_rows_written_and_read_by_hand():
    plan = made()
    memory = plan.least_bytes
    passes = cut_and_ordered(plan, memory, Means((10**9,) * L, ON_HOST, 10**12))
    # So little memory that nothing can wait in it.
    assert passes.where == ON_HOST and passes.order == BY_LAYER
    assert "rows in host memory" in passes.lines()[0]
    row = 4 * 64 + 8
    rows = 0
    for chunk in plan.chunks:
        each = (chunk.rows + 2 * T) * row
        rows += 2 * each * (L - 1 - chunk.first_layer)
        assert 0 <= plan.waiting(chunk) - each < 1000, "the counts wait too"
    assert rows <= passes.choices[0].rows < 1.2 * rows
    assert passes.held == plan.peak_bytes() <= memory


def test_rows_wait_in_memory_where_there_is_some():
    plan = made(d_model=512)
    memory = plan.least_bytes + 3 * sum(plan.held) // 4
    passes = cut_and_ordered(plan, memory, Means((10**9,) * L, ON_DISK, 10**12))
    assert passes.where == IN_MEMORY and passes.choices[0].rows == 0
    waiting = sum(plan.waiting(chunk) for chunk in plan.chunks)
    assert passes.held == plan.peak_bytes() + waiting <= memory
    assert passes.choices[0].weights == 0


@pytest.mark.parametrize("room", [0, 10_000, 30_000, 10**9])
def test_groups_take_the_room_there_is(room):
    plan = made()
    plan.split(memory_for_rows(plan, 15))
    groups = groups_within(plan, plan.chunks, room)
    assert [i for group in groups for i in group] == list(range(len(plan.chunks)))
    for group in groups:
        assert len(group) == 1 or sum(plan.waiting(plan.chunks[i]) for i in group) <= room
    for group, following in itertools.pairwise(groups):
        taken = sum(plan.waiting(plan.chunks[i]) for i in [*group, following[0]])
        assert taken > room
    # Groups that are longer read fewer weights again.
    passes = cut_and_ordered(plan, memory_for_rows(plan, 15), Means((10**9,) * L, ON_DISK, room))
    assert passes.choices[0].weights <= (len(plan.chunks) - 1) * L * 10**9


def test_too_little_for_one_run_is_refused_in_any_order():
    plan = made()
    with pytest.raises(SweepError, match=f"Give at least {plan.least_bytes:,}"):
        cut_and_ordered(plan, plan.least_bytes - 1, Means((1,) * L, ON_DISK, 10**12))
