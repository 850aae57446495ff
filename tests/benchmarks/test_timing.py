"""The timing loop: alternation, medians, stopping."""

import pytest
import torch

from benchmarks.timing import Timing, alternating, machine, relative_difference, require_close


class Clock:
    """A clock that the timed functions move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_records():
    timing = Timing((3.0, 1.0, 2.0, 10.0, 4.0, 5.0))
    assert timing.median == 3.5
    assert timing.record() == {"median": 3.5, "p20": 2.0, "p80": 5.0, "runs": 6}


def test_everyone_runs_once_a_round_in_a_changing_order():
    clock, calls = Clock(), []

    def contender(name: str, cost: float):
        def run() -> None:
            calls.append(name)
            clock.now += cost

        return run

    runs = {"a": contender("a", 1.0), "b": contender("b", 2.0), "c": contender("c", 3.0)}
    found = alternating(runs, seconds=0.0, min_rounds=20, warm_ups=2, clock=clock)
    assert {name: timing.median for name, timing in found.items()} == {"a": 1, "b": 2, "c": 3}
    assert all(len(timing.seconds) == 20 for timing in found.values())
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 22 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3


def test_it_stops_in_time():
    clock = Clock()

    def run() -> None:
        clock.now += 1.0

    assert len(alternating({"a": run}, seconds=30.0, clock=clock)["a"].seconds) == 31
    assert len(alternating({"a": run}, seconds=1.0, clock=clock)["a"].seconds) == 7
    assert len(alternating({"a": run}, seconds=1e9, max_rounds=9, clock=clock)["a"].seconds) == 9


def test_the_device_is_waited_for_around_every_run():
    events: list[str] = []
    alternating(
        {"a": lambda: events.append("run")},
        seconds=0.0,
        min_rounds=2,
        warm_ups=0,
        synchronize=lambda: events.append("wait"),
    )
    assert events == ["wait", "run", "wait"] * 2


def test_differences_are_relative_to_the_range():
    expected = torch.tensor([0.0, 10.0])
    assert relative_difference(expected + 0.5, expected) == pytest.approx(0.05)
    assert relative_difference(expected, expected) == 0.0


def test_a_wrong_result_is_refused():
    right = torch.arange(3.0)
    require_close((right + 1e-4, "cache"), right)
    with pytest.raises(AssertionError, match="differs by 5.0e-03 of the range"):
        require_close(right + 0.01, right)
    with pytest.raises(AssertionError, match="differs by nan"):
        require_close(right * torch.nan, right)


def test_a_machine_is_described_without_its_paths():
    about = machine("cpu")
    assert about["threads"] == torch.get_num_threads() and about["name"]
    assert not any("/" in str(value) and str(value).startswith("/") for value in about.values())
