"""Timing by events: what is recorded around what, with a device that is not one."""

import pytest
import torch

from benchmarks import cuda_timing
from benchmarks.cuda_timing import by_clock, by_events, timed_on


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(cuda_timing, "FLUSHED_BYTES", 64)


class Device:
    """A clock that contenders move, and events that read it."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def Event(self, enable_timing: bool):
        assert enable_timing
        return Event(self)

    def synchronize(self) -> None:
        self.log.append("wait")


class Event:
    def __init__(self, device: Device):
        self.device = device

    def record(self) -> None:
        self.at = self.device.now
        self.device.log.append("record")

    def elapsed_time(self, end: "Event") -> float:
        assert self.device.log[-1] == "wait", "read before the device was waited for"
        return 1e3 * (end.at - self.at)


def test_events_stand_around_each_run_and_are_read_after_the_device_is_done():
    device = Device()

    def contender(name: str, cost: float):
        def run() -> None:
            device.log.append(name)
            device.now += cost

        return run

    found = by_events(
        {"a": contender("a", 1.0), "b": contender("b", 3.0)},
        seconds=0.0,
        min_rounds=5,
        warm_ups=1,
        device="cpu",
        cuda=device,
        clock=lambda: device.now / 2,
    )
    assert {name: one.device.median for name, one in found.items()} == {"a": 1.0, "b": 3.0}
    assert {name: one.host.median for name, one in found.items()} == {"a": 0.5, "b": 1.5}
    assert all(len(one.device.seconds) == 5 for one in found.values())
    assert found["a"].record()["host"] == 0.5 and found["a"].record()["runs"] == 5
    rounds = [device.log[i : i + 7] for i in range(0, len(device.log), 7)]
    assert len(rounds) == 6
    for one in rounds:
        assert one[0] == one[2] == one[3] == one[5] == "record" and one[6] == "wait"
        assert {one[1], one[4]} == {"a", "b"}
    assert len({one[1] for one in rounds}) == 2, "the order never changed"


def test_elsewhere_the_clock_is_read():
    found = timed_on(torch.device("cpu"), {"a": lambda: None}, seconds=0.0, min_rounds=3)
    assert len(found["a"].device.seconds) == 3 and found["a"].device == found["a"].host
    assert by_clock({"a": lambda: None}, seconds=0.0, min_rounds=1, max_rounds=1)["a"]


def test_an_error_of_a_contender_comes_out():
    def broken() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        by_events({"a": broken}, device="cpu", cuda=Device())
