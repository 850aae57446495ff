"""`python -m benchmarks` runs on the CPU, refuses what is wrong, and says where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import cuda_cases, cuda_report, cuda_timing
from benchmarks.cuda_cases import EAGER, FLEX, SDPA, Case, judged
from benchmarks.cuda_devices import problem_of
from benchmarks.cuda_kernels import FAMILIES, choices, family_of, triton_allowed, using
from benchmarks.cuda_work import Work
from fastlens.kernels import reference
from fastlens.kernels.kernel import Kernel
from fastlens.ops import dispatch
from fastlens.settings import TRITON

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    """Everything, at quick sizes, as a user runs it."""
    path = tmp_path_factory.mktemp("results") / "there" / "device.json"
    options = ["--device", "cpu", "--quick", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "benchmarks", *options],
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"written: {path}" in done.stdout and "F.layer_norm" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_everything_runs_and_is_right(record):
    rows = record["rows"]
    assert record["machine"]["device"] == "cpu" and record["machine"]["torch"]
    assert {row["op"] for row in rows} == {
        *("attention", "attention + pattern", "attention_summary", "suffix_attention"),
        *("patch_sites", "patch_sites_", "capture", "capture_int8", "dequantize"),
        *("layer_norm", "rms_norm", "rotary", "model", "sweep"),
    }
    for row in rows:
        assert not row["wrong"] and not row["failed"], row
        assert set(row["seconds"]) == set(row["errors"]) and row["seconds"]
        assert any(name.startswith("fastlens") for name in row["seconds"]), row["title"]
        assert all(timing["runs"] == 3 for timing in row["seconds"].values())
        # A CPU has no data sheet here.
        assert row["ideal_seconds"] is None
    assert len({(row["op"], row["title"]) for row in rows}) == len(rows)


def test_who_takes_part(record):
    def row(op: str, word: str) -> dict:
        return next(r for r in record["rows"] if r["op"] == op and word in r["title"])

    plain = row("attention", "tiny, 2 x 63, fp32")
    assert {EAGER, SDPA, FLEX} < set(plain["seconds"])
    assert row("attention", "cap")["skipped"][SDPA] == "it has no soft cap"
    assert any("triton" in name for name in plain["skipped"])
    assert "gguf, then moved" in row("dequantize", "Q4_0")["seconds"]
    assert row("dequantize", "int8")["skipped"]["gguf"] == "it has no such format"
    assert any("everything cached" in name for name in row("model", "tiny")["seconds"])
    assert any("one forward a site" in name for name in row("sweep", "resid_pre")["seconds"])


def test_without_a_gpu_one_sentence_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("there is no CUDA device here: ") and said.err.count("\n") == 1
    assert not said.out
    assert problem_of("cuda:1") and problem_of("cpu") is None
    assert problem_of("mps") == "only cuda and cpu can be timed here, not mps."
    assert "give cuda" in (problem_of("gpu") or "")


def test_a_card_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert problem_of("cuda") is None and problem_of("cuda:1") is None
    assert problem_of("cuda:2") == "there is no cuda:2: torch sees 2 GPUs."


# -- judging ---------------------------------------------------------------------------------------

TRUTH = torch.tensor([1.0, -4.0], dtype=torch.float64)
EXACT = TRUTH.float()


def test_an_error_is_held_to_eagers():
    eager = EXACT + torch.tensor([0.0, 4e-3])
    error, allowed = judged(EXACT + 7e-3, eager, TRUTH)
    assert error == pytest.approx(7e-3 / 4, rel=1e-3) and error <= allowed
    error, allowed = judged(EXACT + 9e-3, eager, TRUTH)
    assert error > allowed
    nan = EXACT.clone()
    nan[0] = torch.nan
    error, allowed = judged(nan, eager, TRUTH)
    assert not error <= allowed
    # The worst of several tensors counts.
    error, allowed = judged((EXACT, EXACT + 1.0), (eager, eager), (TRUTH, TRUTH))
    assert error > allowed


def test_another_shape_or_dtype_is_wrong():
    for found in (EXACT[:1], EXACT.half()):
        error, allowed = judged(found, EXACT, TRUTH)
        assert not error <= allowed


def test_what_must_be_exact():
    error, allowed = judged(EXACT + 1e-6, EXACT, TRUTH, is_exact=True)
    assert error > allowed == 0.0
    bytes_ = torch.tensor([1, -4], dtype=torch.int8)
    assert judged(bytes_, bytes_, bytes_, is_exact=True) == (0.0, 0.0)
    assert judged(bytes_ + 1, bytes_, bytes_, is_exact=True)[0] > 0.0


def case_of(contenders: dict) -> Case:
    return Case("op", "title", lambda: TRUTH, lambda: EXACT, contenders, work=Work(1.0, 1e9))


def test_the_wrong_is_not_timed(capsys):
    calls = []

    def drifting():
        """Right the first time only."""
        calls.append(1)
        return EXACT + len(calls) - 1.0

    def broken():
        raise RuntimeError("no kernel\nand a long story")

    case = case_of(
        {
            "fastlens: good": lambda: EXACT,
            "fastlens: bad": lambda: EXACT + 0.1,
            "fastlens: drifting": drifting,
            "peer": broken,
        }
    )
    timed = []

    def timing(contenders):
        timed.extend(contenders)
        return cuda_timing.by_clock(contenders, seconds=0.0, min_rounds=1, warm_ups=0)

    (found,) = cuda_report.run_all([case], timing, CPU)
    assert timed == ["fastlens: good"] and set(found["seconds"]) == {"fastlens: good"}
    assert set(found["wrong"]) == {"fastlens: bad", "fastlens: drifting"}
    assert found["failed"] == {"peer": "RuntimeError: no kernel"}
    assert len(cuda_report.faults([found])) == 2
    said = capsys.readouterr().out
    assert "WRONG, not timed: fastlens: bad: error 2.5e-02" in said
    assert "did not run: peer: RuntimeError: no kernel" in said


def test_a_wrong_kernel_fails_the_run(monkeypatch, capsys):
    wrong = [case_of({"fastlens: bad": lambda: EXACT + 1.0})]
    monkeypatch.setitem(command.GROUPS, "norm", lambda setting: iter(wrong))
    assert command.main(["--device", "cpu", "--quick", "--only", "norm"]) == 1
    assert "FAULT  op, title: fastlens: bad: error" in capsys.readouterr().err


def test_a_group_that_breaks_does_not_take_the_others_with_it(monkeypatch, capsys, tmp_path):
    def breaking(setting):
        yield case_of({"fastlens": lambda: EXACT})
        raise RuntimeError("out of memory")

    good = [case_of({"fastlens": lambda: EXACT})]
    monkeypatch.setitem(command.GROUPS, "norm", breaking)
    monkeypatch.setitem(command.GROUPS, "rotary", lambda setting: iter(good))
    path = tmp_path / "device.json"
    options = ["--device", "cpu", "--quick", "--only", "norm", "--only", "rotary"]
    assert command.main([*options, "--json", str(path)]) == 1
    assert "FAULT  norm: stopped by the error above" in capsys.readouterr().err
    assert len(json.loads(path.read_text(encoding="utf-8"))["rows"]) == 2


def test_a_case_that_cannot_be_judged_is_not_timed():
    def too_large():
        raise MemoryError("no room")

    case = Case("op", "title", lambda: TRUTH, too_large, {"fastlens": lambda: EXACT})
    (found,) = cuda_report.run_all([case], lambda contenders: {}, CPU, lambda text: None)
    assert found["failed"] == {"the specification": "MemoryError: no room"}
    assert not found["seconds"] and not cuda_report.faults([found])


def test_lines_of_a_case_on_a_known_card():
    from benchmarks.cuda_devices import GPUS

    def timing(contenders):
        fast = SimpleNamespace(record=lambda: {"median": 1e-3, "host": 1e-4})
        slow = SimpleNamespace(record=lambda: {"median": 2e-3, "host": 1.9e-3})
        return dict(zip(contenders, (slow, fast), strict=True))

    case = case_of({"fastlens": lambda: EXACT, "peer": lambda: EXACT})
    text = cuda_report.described(cuda_report.result_of(case, timing, GPUS[0]), False)
    lines = text.splitlines()
    assert lines[0] == "op: title (roofline 490.4 us, memory)"
    assert lines[1].split() == "1000.0 us peer 49% of the roofline".split()
    assert lines[2].endswith("fastlens  2.00 x  25% of the roofline  (bound by launching)")


def test_a_reason_is_told_once(capsys):
    cases = [case_of({"a": lambda: EXACT}) for _ in range(3)]
    for case in cases:
        case.skipped["peer"] = "not here"
    timing = lambda contenders: {}  # noqa: E731
    list(cuda_report.run_all(cases, timing, CPU))
    assert capsys.readouterr().out.count("left out: peer: not here") == 1


# -- kernels ---------------------------------------------------------------------------------------


def test_every_kernel_is_of_a_family():
    found = {family_of(kernel) for several in dispatch.kernels().values() for kernel in several}
    assert found == set(FAMILIES)


def test_each_family_that_serves_is_a_choice(monkeypatch):
    monkeypatch.delenv(TRITON.name, raising=False)
    served, refused = choices(["rotary"], CPU, torch.float32)
    assert list(served) == ["fastlens: torch rotary by halves"]
    assert "CPU" in refused["fastlens: triton rotary"]

    def fast(*inputs):
        return torch.zeros(3)

    fast.__module__ = "fastlens.kernels.triton_rotary"
    needs = lambda device, dtype: None if TRITON.is_on() else "switch it on"  # noqa: E731
    made = Kernel("rotary", "fast", fast, needs, 99, is_opaque=True)
    table = {**dispatch.kernels(), "rotary": [made, *dispatch.kernels()["rotary"]]}
    monkeypatch.setattr(dispatch, "kernels", lambda: table)
    served, _ = choices(["rotary"], CPU, torch.float32)
    assert list(served) == ["fastlens: torch rotary by halves", "fastlens: fast"]
    assert TRITON.name not in os.environ
    before = dispatch.kernel_for("rotary", "cpu", torch.float32)
    with using(served["fastlens: fast"], CPU, torch.float32):
        assert dispatch.kernel_for("rotary", "cpu", torch.float32) is fast
        assert dispatch.is_opaque("rotary", "cpu", torch.float32)
    assert dispatch.kernel_for("rotary", "cpu", torch.float32) is before
    assert not dispatch.is_opaque("rotary", "cpu", torch.float32)


def test_without_a_kernel_the_reference_serves():
    served, _ = choices(["capture"], CPU, torch.float32)
    assert list(served) == ["fastlens: reference"]
    with using(served["fastlens: reference"], CPU, torch.float32):
        assert dispatch.kernel_for("capture", "cpu", torch.float32) is reference.capture


def test_the_switch_is_put_back(monkeypatch):
    monkeypatch.setenv(TRITON.name, "0")
    with triton_allowed():
        assert TRITON.is_on()
    assert not TRITON.is_on()


# -- peers -----------------------------------------------------------------------------------------


def test_the_quick_sizes_are_of_every_kind():
    """So that masks made for SDPA and FlexAttention are judged too."""
    for kinds in (cuda_cases.QUICK_ATTENTION, cuda_cases.ATTENTION):
        heads = [found for found, _ in kinds]
        assert any(h.window for h in heads) and any(h.padded for h in heads)
        assert any(h.n_queries == 1 for h in heads) and any(h.soft_cap > 0 for h in heads)
        assert any(h.kv_heads < h.heads for h in heads)


def test_clocks_are_read_from_nvidia_smi(monkeypatch):
    monkeypatch.setattr(cuda_report.shutil, "which", lambda name: "nvidia-smi")
    values = "1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W, 570.1\n"

    def run(command, **options):
        assert command[-1] == "--id=1"
        return SimpleNamespace(stdout=values)

    found = cuda_report.clocks(torch.device("cuda:1"), run)
    assert found["clocks.sm"] == "1980 MHz" and found["driver_version"] == "570.1"
    failing = lambda command, **options: SimpleNamespace(stdout="no devices\n")  # noqa: E731
    assert cuda_report.clocks(torch.device("cuda:1"), failing) == {}
    monkeypatch.setattr(cuda_report.shutil, "which", lambda name: None)
    assert cuda_report.clocks(torch.device("cuda:1")) == {}


def test_results_go_to_a_folder_of_the_cards_name():
    assert command.folder_of("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
