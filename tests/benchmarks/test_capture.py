"""benchmarks/capture.py runs, and refuses results that differ."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import capture
from fastlens.store import Store


def test_it_runs(capsys: pytest.CaptureFixture[str]):
    capture.main(["--smoke"])
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 2000 and record["ratio"]["forwards"] == 1


def test_results_that_differ_stop_it(tmp_path: Path):
    with Store.create(tmp_path) as store:
        store.append({"x": torch.ones(2).bfloat16()})
    capture.check_equal(store, "x", [torch.ones(2)])
    with pytest.raises(SystemExit, match="batch 0"):
        capture.check_equal(store, "x", [torch.zeros(2)])
    with pytest.raises(SystemExit, match="1 batches"):
        capture.check_equal(store, "x", [])
