"""What holds for every timing suite: results are compared first, and nothing names the machine."""

import os

# Before huggingface_hub is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.timing import machine, require_close


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Threads and versions instead of the host's name."""
    del config
    machine_info.pop("node", None)
    machine_info.update(machine("cpu"))


@pytest.fixture(scope="session")
def only_checked(request: pytest.FixtureRequest) -> bool:
    """Whether nothing is timed, so that small sizes do."""
    return request.config.getoption("benchmark_disable")


@pytest.fixture
def time_checked(benchmark: Any) -> Callable[..., None]:
    """Times a function that was found to give what is expected, without gradients.

    It returns a tensor, or a tuple that begins with one. Others of the same ``group`` stand in one
    table with it.
    """

    def time(run: Callable[[], Any], expected: torch.Tensor, group: str) -> None:
        benchmark.group = group
        with torch.no_grad():
            require_close(run(), expected)
            benchmark(run)

    return time
