"""benchmarks/streaming.py refuses results that differ, and writes the docs' table."""

import pytest
import torch

from benchmarks import streaming


def made() -> dict:
    """A results file with made-up figures."""
    seconds = {"in memory": 10.0, "in memory again": 10.1, "streamed": 12.0}
    taken = {"peak": 600_000_000, "loaded": 14_000_000, "block": 100, "limit": 668_000_000}
    return {
        "machine": {"threads": 2, "name": "a processor", "torch": "2"},
        "n_pos": 24,
        "peaks": {"llama": {**taken, "weights": 2_004_000_000}, "disk": taken, "cpu": taken},
        "sweep": {name: {"median": s} for name, s in seconds.items()},
        "load": {"fastlens": {"median": 2.5}},
    }


def test_table():
    text = streaming.table(made())
    assert "| 668 MB | 600 MB |" in text
    assert "takes 1.20 x the time of the sweep in memory (that again: 1.01 x)" in text
    assert "2.50 s (fastlens)" in text


def test_results_that_differ_stop_it():
    streaming.check_equal([torch.ones(2)], [torch.ones(2)])
    with pytest.raises(SystemExit, match="differ by 1.0e"):
        streaming.check_equal([torch.ones(2)], [torch.zeros(2)])


def test_a_failing_process_says_why():
    with pytest.raises(SystemExit, match="there is no such file"):
        streaming.in_a_process("./nowhere", [1], [2], offload="disk")


def test_the_docs_have_the_place_for_the_table():
    text = streaming.DOCS.read_text(encoding="utf-8")
    assert text.index(streaming.BEGIN) < text.index(streaming.END)
