"""benchmarks/patterns.py runs on a tiny model, refuses wrong patterns, writes README's table."""

import json

import pytest
import torch

from benchmarks import patterns


def made() -> dict:
    """A results file with made-up figures."""
    timings = {"forward": 2.0, "forward again": 2.02, "captured": 2.1}
    memory = {name: {"peak": 10.0 * i} for i, name in enumerate(patterns.CASES, 1)}
    return {
        "machine": {"threads": 2, "name": "a processor", "torch": "2"},
        "lengths": patterns.LENGTHS,
        "time": {
            "max_difference": 3e-7,
            "seconds": {name: {"median": s} for name, s in timings.items()},
        },
        "pattern": memory,
        "caches": {"1024": {"held": 430.0}, "4096": {"held": 1700.0}},
        "rows": {"peak": 25.0, "file": 3221.0},
    }


@pytest.mark.tl
def test_time_of_a_tiny_model_after_its_patterns_were_compared():
    pytest.importorskip("transformer_lens")
    lengths = {"pattern": 24}
    found = patterns.time_of_pattern(patterns.TINY, lengths, seconds=0.01, min_rounds=2)
    assert found["max_difference"] <= 1e-6
    assert set(found["seconds"]) == {"forward", "forward again", "captured"}


@pytest.mark.tl
def test_wrong_patterns_are_never_timed(monkeypatch):
    pytest.importorskip("transformer_lens")
    monkeypatch.setattr(patterns, "pattern_difference", lambda *_: 1e-3)
    with pytest.raises(SystemExit, match=r"differs from TransformerLens' by 1\.0e-03"):
        patterns.time_of_pattern(patterns.TINY, {"pattern": 8})


@pytest.mark.slow
@pytest.mark.tl
def test_each_memory_case_runs_in_a_process_of_its_own():
    pytest.importorskip("transformer_lens")
    for whose in ("fastlens", "TransformerLens"):
        assert set(patterns.in_a_process(["pattern", whose], True)) == {"peak", "held"}
    with pytest.raises(SystemExit, match="failed"):
        patterns.in_a_process(["nothing"], True)


def test_rows_reach_the_disk_whole():
    found = patterns.rows_to_disk(patterns.TINY, patterns.TINY_LENGTHS)
    assert found["file"] * 1e6 == 8 * 256 * 256 * 4


def test_a_full_cache_of_a_tiny_model():
    found = patterns.memory_of_cache(patterns.TINY, patterns.TINY_LENGTHS, 32)
    assert found["nbytes"] > 0


def test_the_table_and_where_it_stands(tmp_path, monkeypatch):
    table = patterns.table(made())
    assert "| 1.05 x (a forward again: 1.01 x) |" in table
    assert "| 430 MB | 1,930 MB |" in table and "3,221 MB" in table
    readme, results = tmp_path / "README.md", tmp_path / "results.json"
    readme.write_text(f"a\n{patterns.BEGIN}\nold\n{patterns.END}\nb\n", encoding="utf-8")
    results.write_text(json.dumps(made()), encoding="utf-8")
    monkeypatch.setattr(patterns, "README", readme)
    monkeypatch.setattr(patterns, "RESULTS", results)
    patterns.main(["--readme"])
    text = readme.read_text(encoding="utf-8")
    assert text == f"a\n{patterns.BEGIN}\n{table}\n{patterns.END}\nb\n"


def test_memory_is_that_of_this_process():
    found = patterns.measured(lambda: torch.ones(4_000_000))
    assert 14 < found["held"] < 40 and found["peak"] >= found["held"]
