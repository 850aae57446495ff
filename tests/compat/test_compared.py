"""What test files say they compare with TransformerLens (lists called COMPARED), they do run."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("transformer_lens")

from tests.compat.test_surface import TESTS, compared_elsewhere


@pytest.mark.full
@pytest.mark.tl
@pytest.mark.parametrize("file", sorted(set(compared_elsewhere().values())))
def test_listed_names_run_in_both_libraries(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.compat.watch_compared"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(TESTS / file)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
