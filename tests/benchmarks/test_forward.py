"""benchmarks/forward.py runs, refuses wrong results, and writes what README shows."""

import json

import pytest
import torch

from benchmarks import forward


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record() -> dict:
    """A results file with made-up seconds."""
    seconds = {forward.HF: 0.1, forward.OURS: 0.09, forward.HF_AGAIN: 0.101}
    seconds |= {forward.OURS_CACHE: 0.092}
    rows = [
        {
            "model": "GPT-2 small",
            "tokens": 16,
            "grad": False,
            "max_difference": 1e-7,
            "seconds": {
                n: {"median": s, "p20": s, "p80": s, "runs": 7} for n, s in seconds.items()
            },
        }
    ]
    about = {"threads": 2, "name": "a processor", "torch": "2", "transformers": "5"}
    return {"machine": about, "rows": rows}


def test_smoke(capsys):
    threads = str(torch.get_num_threads())
    found = forward.main(["--smoke", "--threads", threads])
    assert found is not None
    cases = [(row["model"], row["tokens"], row["grad"]) for row in found["rows"]]
    assert len(cases) == len(set(cases)) == 8
    for row in found["rows"]:
        assert row["max_difference"] < 1e-5
        assert {forward.HF, forward.HF_AGAIN, forward.OURS, forward.OURS_CACHE} <= set(
            row["seconds"]
        )
        assert all(timing["runs"] == 2 for timing in row["seconds"].values())
    assert json.loads(json.dumps(found)) == found
    assert "fastlens/hf" in capsys.readouterr().out


def test_wrong_results_are_never_timed():
    logits = torch.arange(6.0)
    runs = {forward.HF: lambda: logits, forward.OURS: lambda: logits + 0.01}
    with pytest.raises(SystemExit, match="fastlens differs from Hugging Face by 2.0e-03"):
        forward.checked_difference(runs)
    nan = {forward.HF: lambda: logits, forward.OURS: lambda: logits * torch.nan}
    with pytest.raises(SystemExit, match="differs"):
        forward.checked_difference(nan)
    near = {forward.HF: lambda: logits, forward.OURS: lambda: (logits + 1e-4, "cache")}
    assert forward.checked_difference(near) == pytest.approx(2e-5, rel=0.1)


def test_the_table_is_made_of_the_results(record):
    table = forward.table(record)
    assert "| GPT-2 small | 16 | off | 100.0 ms | 0.90 x | 1.01 x | - | 0.92 x | - |" in table
    assert "2 threads, a processor" in table
    assert "Not measured yet" in forward.table(None)


def test_only_the_table_is_rewritten(record):
    text = f"above\n{forward.BEGIN}\nold\n{forward.END}\nbelow\n"
    new = forward.with_table(text, record)
    assert new.startswith("above\n") and new.endswith("\nbelow\n") and "old" not in new
    assert forward.with_table(new, record) == new
    with pytest.raises(SystemExit, match="lacks"):
        forward.with_table("no markers", record)


def test_readme_shows_the_committed_results():
    text = forward.README.read_text(encoding="utf-8")
    assert forward.with_table(text, forward.read_results()) == text, (
        "run `python benchmarks/forward.py --readme`"
    )


def test_writing(record, tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "RESULTS", forward.ROOT / "benchmarks" / "nothing.json")
    assert forward.read_results(tmp_path / "none.json") is None
    with pytest.raises(SystemExit):
        forward.main(["--smoke", "--write"])
    readme = tmp_path / "README.md"
    readme.write_text(f"{forward.BEGIN}\n{forward.END}\n")
    monkeypatch.setattr(forward, "README", readme)
    monkeypatch.setattr(forward, "read_results", lambda: record)
    forward.main(["--readme"])
    assert "GPT-2 small" in readme.read_text()


def test_a_device_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no CUDA device here"):
        forward.main(["--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        forward.main(["--device", "cuda", "--write"])
    assert "python -m benchmarks" in capsys.readouterr().err
