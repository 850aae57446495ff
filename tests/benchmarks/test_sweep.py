"""benchmarks/sweep.py runs, refuses wrong results, and times what it says."""

import contextlib
import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import sweep, sweep_cases
from benchmarks.forward import TINY
from benchmarks.peers import loops, process, stacked
from benchmarks.sweep import Contender
from benchmarks.sweep_cases import Case
from benchmarks.sweep_report import (
    AGAIN,
    ALONE,
    BY_HAND,
    FUNCTION,
    HF,
    HF_FORWARD,
    NNSIGHT,
    OURS,
    TL3,
    TL4,
    VERIFIED,
)
from tests.smollm2 import smollm2


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> sweep.Models:
    """The tiny GPT-2, Hugging Face's and ours."""
    return sweep.Models(*sweep_cases.of_shape(TINY[0]), None)


def test_smoke(capsys):
    found = sweep.main(["--smoke", "--threads", str(torch.get_num_threads())])
    assert found is not None
    assert [row["name"] for row in found["rows"]] == [case.name for case in sweep.CASES]
    for row in found["rows"]:
        is_long = row["name"] == "resid_pre-64"
        everyone = (
            {OURS, AGAIN} if is_long else {OURS, AGAIN, VERIFIED, FUNCTION, HF, BY_HAND, ALONE}
        )
        assert everyone <= set(row["seconds"])
        assert set(row["differences"]) >= everyone - {OURS}
        assert all(difference < 1e-5 for difference in row["differences"].values())
        assert row["plan"]["strategy"] == "wave" and row["plan"]["flops"] > 0
        assert len(row["flops_per_second"]) == 4
        assert (TL3 in row["seconds"]) == (TL3 in found["peers"] and not is_long)
    # 48 sites in stacks of 4, of which 0.3 are drawn.
    assert found["rows"][3]["scale"][HF] == 3.0
    assert found["rows"][0]["scale"][HF] == 1.0
    assert json.loads(json.dumps(found)) == found
    assert [row["model"] for row in found["rows"]] == ["tiny GPT-2"] * 5 + ["tiny Llama"]
    said = capsys.readouterr().out
    assert f"{NNSIGHT} is left out: no --nnsight-python is given" in said
    assert f"{TL4} is left out: no --tl4-python is given" in said
    assert "resid_pre-64: 24 sites, 12 tokens, first difference at 1" in said


def with_vocabulary(size: int) -> SimpleNamespace:
    return SimpleNamespace(cfg=SimpleNamespace(d_vocab=size))


def test_the_issues_sweeps():
    random = [case for case in sweep.CASES if case.texts is None]
    indices = {case.name: case.indices(12, 12) for case in random}
    assert {name: len(found) for name, found in indices.items()} == {
        "resid_pre": 192,
        "resid_pre-minimal": 180,
        "z": 144,
        "z-minimal": 2160,
        "resid_pre-64": 768,
    }
    assert indices["z-minimal"][:2] == [(0, 0, 0), (0, 0, 1)] and indices["z"][12] == (1, 0)
    for case in random:
        clean, corrupted = case.prompts(with_vocabulary(50257))
        agree = (clean == corrupted)[0].tolist()
        assert agree == [True] * case.differ + [False] * (case.tokens - case.differ)
    by_name = {case.name: case for case in sweep.CASES}
    drawn = by_name["z-minimal"].drawn(2160)
    assert len(drawn) == 216 == len(set(drawn))
    # Whole stacks: the heads of one layer and position.
    assert all(drawn[i] // 12 == drawn[i + 11] // 12 for i in range(0, 216, 12))
    assert drawn == by_name["z-minimal"].drawn(2160)
    assert by_name["resid_pre"].drawn(192) == list(range(192))


@pytest.mark.parametrize("case", sweep.SMOKE_CASES[:4], ids=lambda case: case.name)
def test_every_way_patches_what_it_should(models, case):
    """Against forwards with one patch each, written here."""
    clean, corrupted = case.prompts(models.ours)
    metric = loops.difference_of(*case.answers(models.ours))
    indices = case.indices(2, 4)
    place = "hook_resid_pre" if case.site == "resid_pre" else "attn.hook_z"
    _, cache = models.ours.run_with_cache(clean)
    expected = []
    for index in indices:
        at = dict(zip(case.by, index, strict=True))
        name = f"blocks.{at['layer']}.{place}"

        def put(value, hook, at=at, name=name):
            pos = at.get("pos", slice(None))
            where = (0, pos, at["head"]) if "head" in at else (0, pos)
            value[where] = cache[name][where]
            return value

        with torch.no_grad():
            logits = models.ours.run_with_hooks(corrupted, fwd_hooks=[(name, put)])
        expected.append(metric(logits))
    expected = torch.stack(expected)
    assert expected.max() - expected.min() > 1e-3
    everyone = sweep.our_contenders(models, case) | sweep.slow_contenders(models, case)
    for contender in everyone.values():
        rows = slice(None) if contender.rows is None else contender.rows
        torch.testing.assert_close(contender.run(), expected[rows], atol=2e-6, rtol=0)


def test_stacks_cross_layers():
    stacks = stacked.stacks_of([(0, 4), (0, 5), (1, 0)], ("layer", "pos"), 2)
    assert [sorted(stack) for stack in stacks] == [[0], [1]]
    (mixed,) = stacked.stacks_of([(0, 4), (1, 0), (0, 5)], ("layer", "pos"), 16)
    assert mixed[0].rows.tolist() == [0, 2] and mixed[1].rows.tolist() == [1]
    assert mixed[0].pos.tolist() == [4, 5] and mixed[0].head is None
    assert stacked.size_of(mixed) == 3


def test_wrong_results_are_never_timed():
    values = torch.tensor([0.0, 1.0, 2.0])

    def against(other, rows=None, gap=0.0):
        contenders = {OURS: Contender(lambda: values), HF: Contender(lambda: other, rows)}
        return sweep.checked_differences(contenders, gap)

    assert against(values + 5e-5) == {HF: pytest.approx(5e-5, rel=0.1)}
    assert against(values + 5e-4, gap=10.0)[HF] > 1e-4
    assert against(values[[0, 2]], [0, 2]) == {HF: 0.0}
    with pytest.raises(SystemExit, match="hf stacked by hand differs from fastlens by 2.0e-04"):
        against(values + 2e-4)
    with pytest.raises(SystemExit, match="differs"):
        against(values * torch.nan)
    with pytest.raises(SystemExit, match="gives 2 values where fastlens gives 3"):
        against(values[:2])


def test_a_contender_that_patches_nothing_is_refused_however_small_the_effects():
    values = torch.tensor([1.0, 1.0 + 5e-5, 1.0 - 5e-5])
    contenders = {OURS: Contender(lambda: values), HF: Contender(lambda: torch.ones(3))}
    with pytest.raises(SystemExit, match="differs"):
        sweep.checked_differences(contenders, 0.0)


def test_a_wrong_sweep_stops_the_measurement(models, monkeypatch):
    true = stacked.hugging_face
    monkeypatch.setattr(stacked, "hugging_face", lambda *a: true(*a).flip(0))
    with pytest.raises(SystemExit, match="hf stacked by hand differs"):
        sweep.measure(
            *(models, sweep.SMOKE_CASES[0]), rounds=1, seconds=0.0, slow_runs=sweep.SLOW_RUNS
        )


def test_quick_ones_run_between_the_slow_ones():
    calls: list[str] = []
    quick = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    slow = {name: lambda name=name: calls.append(name) for name in ("S", "T")}
    found = sweep.timed(quick, slow, rounds=10, seconds=0.0, slow_runs={"S": 3, "T": 1})
    assert {name: len(timing.seconds) for name, timing in found.items()} == {
        **dict.fromkeys("abc", 10),
        "S": 3,
        "T": 1,
    }
    # Five parts of two rounds; one more before them that does not count.
    parts = "".join(calls).replace("T", "S").split("S")
    assert [len(part) for part in parts] == [9, 6, 6, 6, 6]
    assert all(sorted(part[i : i + 3]) == ["a", "b", "c"] for part in parts for i in (0, 3))
    assert len({part[-6:] for part in parts}) > 1


def test_products_have_the_models_shapes(models):
    found = sweep.products(models.ours.cfg, 10)
    assert list(found) == [
        "linear qkv, 10 x 32 x 96",
        "linear o, 10 x 32 x 32",
        "linear in, 10 x 32 x 128",
        "linear out, 10 x 128 x 32",
    ]
    assert found["linear qkv, 10 x 32 x 96"][1] == 2 * 4 * 10 * 32 * 96
    for multiply, _ in found.values():
        multiply()


def test_the_widest_layer(models):
    case = Case("resid_pre", "", "resid_pre", ("layer", "pos"), 6, 4)
    clean, corrupted = case.prompts(models.ours)
    metric = sweep.logit_diff(11, 22)
    query = sweep.plan(
        *(models.ours, clean, corrupted), sites="resid_pre", by=case.by, metric=metric
    )
    # Base 6, the other prompt's last 2; then keys of the second layer: runs that are under way have
    # suffixes of 2 and 1, and runs that join there the one row that is patched.
    assert sweep.widest(query.plan) == (6 + 2) + (2 + 1) + (1 + 1)


# Answers as the worker does; ends at the job "bad", saying why.
WORKER = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
assert (folder / "config.json").is_file()
jobs = json.loads((folder / "jobs.json").read_text())
print(json.dumps({"package": "transformer-lens 4.3.0"}), flush=True)
for line in sys.stdin:
    if line.strip() == "bad":
        sys.exit("something broke")
    print(json.dumps([len(jobs["jobs"][line.strip()]["indices"]), jobs["threads"]]), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def test_a_library_in_its_own_process(models, worker):
    jobs = sweep.jobs_of(sweep.SMOKE_CASES[:5], models.ours)
    # The 64-token sweep is not theirs.
    assert list(jobs) == [case.name for case in sweep.SMOKE_CASES[:4]]
    assert not jobs["resid_pre"]["drawn"] and len(jobs["resid_pre"]["indices"]) == 12
    assert jobs["z-minimal"]["drawn"] and len(jobs["z-minimal"]["indices"]) == 16
    assert jobs["z-minimal"]["answers"] == (11, 22) and jobs["z-minimal"]["stack"] == 4
    with process.started(worker, sys.executable, models.hf, jobs, threads=3) as peer:
        assert peer.about == {"package": "transformer-lens 4.3.0"}
        assert peer.run("z-minimal").tolist() == [16, 3]
        assert peer.run("z-minimal").tolist() == [16, 3]
        with pytest.raises(SystemExit, match="worker.py ended: something broke"):
            peer.run("bad")


def test_a_python_that_is_not_there(models):
    with pytest.raises(SystemExit, match="/no/such/python cannot be run"):
        with process.started(process.NNSIGHT, "/no/such/python", models.hf, {}, threads=1):
            pass


def test_peers_are_for_the_gpt2_and_of_the_version_that_they_are_named_for(
    models, worker, monkeypatch
):
    monkeypatch.setattr(sweep, "WORKERS", {TL4: worker, NNSIGHT: worker})
    cases = sweep.SMOKE_CASES[:1]

    def started(stack, pythons, hf, ours):
        return sweep.started_peers(stack, pythons, hf, ours, cases, 1)

    with contextlib.ExitStack() as stack:
        pythons = {TL4: sys.executable, NNSIGHT: None}
        found = started(stack, pythons, models.hf, models.ours)
        assert list(found) == [TL4]
        assert found[TL4].about["package"] == "transformer-lens 4.3.0"
        assert started(stack, pythons, *sweep_cases.of_shape(TINY[1])) == {}
        with pytest.raises(SystemExit, match="--nnsight-python has transformer-lens 4.3.0, not"):
            started(stack, {NNSIGHT: sys.executable}, models.hf, models.ours)


def test_the_real_model_is_left_out_where_it_is_not_installed(capsys, monkeypatch):
    with monkeypatch.context() as missing:
        missing.setattr(sweep_cases.importlib.util, "find_spec", lambda name: None)
        assert sweep_cases.smollm2() is None
    monkeypatch.setitem(sweep.MODELS, sweep_cases.REAL, lambda device: None)
    found = sweep.main(["--only", "smollm2", "--threads", str(torch.get_num_threads())])
    assert found is not None and found["rows"] == []
    assert "SmolLM2-135M is left out: its package is not installed" in capsys.readouterr().out


def test_the_real_models_pair_is_the_demos():
    from fastlens.cli import demo

    (case,) = (case for case in sweep.CASES if case.texts is not None)
    assert case.texts == (demo.CLEAN, demo.CORRUPTED)
    assert case.words == (demo.ANSWER, demo.WRONG)
    model = smollm2()
    clean, corrupted = case.prompts(model)
    assert clean.shape == corrupted.shape == (1, case.tokens)
    assert (clean != corrupted)[0].nonzero()[0] == case.differ
    assert [model.to_string(token) for token in case.answers(model)] == [" Paris", " Rome"]


def test_no_forward_of_another_shape_is_compared_with_the_reference(monkeypatch, models):
    words = dataclasses.replace(sweep.SMOKE_CASES[0], texts=("a", "b"))
    prompts = sweep.SMOKE_CASES[0].prompts(models.ours)
    monkeypatch.setattr(Case, "prompts", lambda self, model: prompts)
    monkeypatch.setattr(Case, "answers", lambda self, model: (11, 22))
    row = sweep.measure(
        *(models, words), rounds=1, seconds=0.0, slow_runs=dict.fromkeys(sweep.SLOW_RUNS, 1)
    )
    assert HF_FORWARD not in row["seconds"] and OURS in row["seconds"]


def test_writing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        sweep.main(["--smoke", "--write"])
    record = {"machine": {}, "peers": {}, "rows": []}
    readme = tmp_path / "README.md"
    readme.write_text("text")
    monkeypatch.setattr(sweep, "README", readme)
    monkeypatch.setattr(sweep, "read_results", lambda: record)
    monkeypatch.setattr(sweep, "with_table", lambda text, found: f"{text} {found is record}")
    assert sweep.main(["--readme"]) is None
    assert readme.read_text() == "text True"


def test_a_device_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no CUDA device here"):
        sweep.main(["--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        sweep.main(["--device", "cuda", "--write"])
    assert "only what runs in this process is timed" in capsys.readouterr().err
