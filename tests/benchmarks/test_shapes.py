"""benchmarks/shapes.py runs, compares before it times, and divides what it says."""

import pytest
import torch

from benchmarks import shapes


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_smoke(capsys):
    rows = shapes.main(["--smoke", "--threads", "1"])
    assert [row["name"] for row in rows] == list(shapes.SHAPES)
    for row in rows:
        assert row["strategy"] == "wave" and row["sites"] == 12 and row["less work"] > 1
        best = min(row["seconds"]["16 stacked"], row["seconds"]["32 stacked"])
        assert row["faster"] == best / row["seconds"][shapes.OURS]
        assert row["efficiency"] == row["faster"] / row["less work"]
    assert capsys.readouterr().out.count("x less work") == 3


def test_wrong_values_are_not_timed(monkeypatch):
    name = next(iter(shapes.SHAPES))
    plain = shapes.stacked.hugging_face
    monkeypatch.setattr(shapes.stacked, "hugging_face", lambda *a: plain(*a) + 1.0)
    with pytest.raises(SystemExit, match="differs by .* nothing was timed"):
        shapes.measure(name, is_tiny=True, tokens=6, rounds=1)
