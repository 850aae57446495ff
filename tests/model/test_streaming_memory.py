"""``max_memory`` is a promise: resident memory of a fresh process, and the same numbers."""

from pathlib import Path

import pytest

from benchmarks import streaming
from benchmarks.peers.llama_checkpoint import SMALL, TWO_GIGABYTES, write_llama
from tests.smollm2 import smollm2

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")


@pytest.mark.parametrize(
    "sizes, share",
    [(SMALL, 2), pytest.param(TWO_GIGABYTES, 3, marks=pytest.mark.full)],
)
def test_a_sweep_within_part_of_the_weights(tmp_path, sizes, share):
    folder = tmp_path / "llama"
    limit = write_llama(folder, sizes) // share
    pair = streaming.token_pair(12)
    taken, found = streaming.in_a_process(str(folder), *pair, max_memory=limit)
    assert taken["peak"] <= limit
    streaming.check_equal(streaming.in_memory(str(folder), *pair), found)


@pytest.mark.parametrize("offload", ["disk", pytest.param("cpu", marks=pytest.mark.full)])
def test_smollm2_packed(offload):
    smollm2()  # skips where the package is not installed
    limit = streaming.SMOLLM2_LIMIT
    taken, found = streaming.in_a_process(
        streaming.SMOLLM2, *streaming.TEXTS, offload=offload, max_memory=limit
    )
    packed = streaming.PACKED_BYTES if offload == "cpu" else 0
    assert taken["loaded"] <= packed + 2 * taken["block"]
    assert taken["peak"] <= limit
    streaming.check_equal(streaming.in_memory(streaming.SMOLLM2, *streaming.TEXTS), found)
