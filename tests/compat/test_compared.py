"""What test files say they compare with TransformerLens (lists called COMPARED), they do run."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("transformer_lens")

from tests.compat.test_surface import TESTS, compared_elsewhere


@pytest.mark.full
@pytest.mark.tl
def test_listed_names_run_in_both_libraries():
    """All those files once more in one process, with every function that runs noted down."""
    files = sorted({str(TESTS / file) for file in compared_elsewhere().values()})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.compat.watch_compared"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *files],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
    )
    assert files and done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
