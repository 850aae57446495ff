"""Timing on one device: CUDA events on a GPU, the processor's clock elsewhere."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import WARM_UPS, Timing, alternating

# More than any L2 cache: what the last contender left there helps nobody.
FLUSHED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Measured:
    """One contender's runs.

    Attributes:
        device: From before its first launch to the end of its last, on the device.
        host: Until the call returned; where this is the longer, launching is what was timed.
    """

    device: Timing
    host: Timing

    def record(self) -> dict[str, Any]:
        """Medians and percentiles in seconds."""
        return {**self.device.record(), "host": self.host.median}


def by_clock(contenders: Mapping[str, Callable[[], Any]], **options: Any) -> dict[str, Measured]:
    """As `alternating`: a call is over when it returns, or ``synchronize`` does."""
    timings = alternating(contenders, **options)
    return {name: Measured(timing, timing) for name, timing in timings.items()}


def by_events(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 2.0,
    min_rounds: int = 10,
    max_rounds: int = 100,
    warm_ups: int = WARM_UPS,
    device: torch.device | str = "cuda",
    cuda: Any = torch.cuda,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measured]:
    """In rounds, each of which runs every contender once, in a shuffled order, with cold caches.

    A buffer larger than the L2 cache is overwritten before every run; meanwhile the host runs ahead
    and queues the launches, so that short kernels are timed and not their launching.

    Args:
        seconds: Stop after about so long.
        min_rounds, max_rounds: But not before, and not after, so many rounds.
        warm_ups: Rounds that do not count: kernels are compiled in the first.
    """
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    on_device: dict[str, list[float]] = {name: [] for name in order}
    on_host: dict[str, list[float]] = {name: [] for name in order}
    buffer = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    started = clock()
    for round_number in range(warm_ups + max_rounds):
        if round_number == warm_ups:
            started = clock()
        elif round_number >= warm_ups + min_rounds and clock() - started > seconds:
            break
        shuffle(order)
        events = {}
        for name in order:
            begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
            buffer.zero_()
            begin.record()
            called = clock()
            contenders[name]()
            returned = clock()
            end.record()
            events[name] = begin, end, returned - called
        cuda.synchronize()
        if round_number >= warm_ups:
            for name, (begin, end, host) in events.items():
                on_device[name].append(begin.elapsed_time(end) / 1e3)
                on_host[name].append(host)
    return {
        name: Measured(Timing(tuple(on_device[name])), Timing(tuple(on_host[name])))
        for name in contenders
    }


def timed_on(
    device: torch.device, contenders: Mapping[str, Callable[[], Any]], **options: Any
) -> dict[str, Measured]:
    """Events on CUDA, the clock elsewhere."""
    if device.type == "cuda":
        return by_events(contenders, device=device, **options)
    return by_clock(contenders, **options)
