"""The timing suites run and check what they time; `make test` does not collect them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_timing_is_of_a_right_result():
    mine = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = "pytest benchmarks --benchmark-disable -q -p no:cacheprovider"
    found = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        env=mine,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    # Kernels, the reference and PyTorch for each op and length; four forwards of two models.
    passed, _, rest = found.stdout.splitlines()[-1].partition(" passed")
    assert rest.startswith(" in ") and int(passed) >= 92


def test_they_are_no_tests(request):
    assert request.config.getini("testpaths") == ["tests"]
