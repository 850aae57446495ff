"""How benchmarks time: contenders in alternation, in one process, on inputs checked to agree.

Alternating spreads whatever else the machine does over all contenders alike, so that ratios mean
something where absolute times do not. Time one contender twice to see how much noise is left.
"""

import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WARM_UPS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender's runs, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle run."""
        return statistics.median(self.seconds)

    def record(self) -> dict[str, float | int]:
        """Median, 20th and 80th percentile in seconds, and the number of runs."""
        ordered = sorted(self.seconds)
        last = len(ordered) - 1
        return {
            "median": self.median,
            "p20": ordered[round(0.2 * last)],
            "p80": ordered[round(0.8 * last)],
            "runs": len(ordered),
        }


def alternating(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 10.0,
    min_rounds: int = 7,
    max_rounds: int = 200,
    warm_ups: int = WARM_UPS,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions in rounds, each of which runs every one of them once, in a shuffled order.

    Args:
        contenders: Name -> function; what it returns is dropped before the next one starts.
        seconds: Stop after about so long.
        min_rounds, max_rounds: But not before, and not after, so many rounds.
        warm_ups: Rounds that do not count.
        synchronize: Called before a clock is read; for a GPU, ``torch.cuda.synchronize``.
    """
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    found: dict[str, list[float]] = {name: [] for name in order}
    started = clock()
    for round_number in range(warm_ups + max_rounds):
        if round_number == warm_ups:
            started = clock()
        elif round_number >= warm_ups + min_rounds and clock() - started > seconds:
            break
        shuffle(order)
        for name in order:
            synchronize()
            begin = clock()
            contenders[name]()
            synchronize()
            if round_number >= warm_ups:
                found[name].append(clock() - begin)
    return {name: Timing(tuple(runs)) for name, runs in found.items()}


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |difference| over the range of ``expected``."""
    actual, expected = actual.detach().double(), expected.detach().double()
    spread = (expected.max() - expected.min()).clamp(min=1e-300)
    return float((actual - expected).abs().max() / spread)


def require_close(found: Any, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    """Raise an AssertionError unless a result is what it should be: else no time means anything.

    Args:
        found: A tensor, or a tuple that begins with one.
        tolerance: Part of the range of ``expected``; DESIGN section 8's bound for real models.
    """
    difference = relative_difference(found[0] if isinstance(found, tuple) else found, expected)
    assert difference <= tolerance, f"differs by {difference:.1e} of the range"


def machine(device: str) -> dict[str, Any]:
    """What a figure needs beside it: processor, threads, versions."""
    import transformers

    import fastlens

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device,
        "name": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "fastlens": fastlens.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
