"""benchmarks/sweep.py runs, refuses wrong results, and times what it says."""

import json
import sys

import pytest
import torch

from benchmarks import sweep
from benchmarks.peers import loops, stacked, transformer_lens_4
from benchmarks.sweep import Case, Contender
from benchmarks.sweep_report import AGAIN, ALONE, BY_HAND, FUNCTION, HF, OURS, TL3, TL4, VERIFIED


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> sweep.Models:
    """The tiny GPT-2, Hugging Face's and ours."""
    hf = sweep.TINY[0].build()
    ours = sweep.HookedTransformer.from_pretrained_no_processing(
        "tiny GPT-2", hf_model=hf, device="cpu", verbose=False
    ).eval()
    return sweep.Models(hf, ours, None)


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
    said = capsys.readouterr().out
    assert f"{TL4} is left out: no --tl4-python is given" in said
    assert "resid_pre-64: 24 sites, 12 tokens, first difference at 1" in said


def test_the_issues_sweeps():
    indices = {case.name: case.indices(12, 12) for case in sweep.CASES}
    assert {name: len(found) for name, found in indices.items()} == {
        "resid_pre": 192,
        "resid_pre-minimal": 180,
        "z": 144,
        "z-minimal": 2160,
        "resid_pre-64": 768,
    }
    assert indices["z-minimal"][:2] == [(0, 0, 0), (0, 0, 1)] and indices["z"][12] == (1, 0)
    for case in sweep.CASES:
        clean, corrupted = case.prompts(50257)
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
    clean, corrupted = case.prompts(100)
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
        expected.append(loops.metric(logits))
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
    clean, corrupted = case.prompts(100)
    metric = sweep.logit_diff(loops.ANSWER, loops.WRONG)
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
print(json.dumps({"transformer_lens": "4.3.0"}), flush=True)
for line in sys.stdin:
    if line.strip() == "bad":
        sys.exit("something broke")
    print(json.dumps([len(jobs["jobs"][line.strip()]["indices"]), jobs["threads"]]), flush=True)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    monkeypatch.setattr(transformer_lens_4, "WORKER", path)


@pytest.mark.usefixtures("worker")
def test_the_process_of_transformer_lens_4(models):
    jobs = sweep.jobs_of(sweep.SMOKE_CASES, models.ours.cfg)
    # The 64-token sweep is not theirs.
    assert list(jobs) == [case.name for case in sweep.SMOKE_CASES[:4]]
    assert jobs["resid_pre"]["indices"] is None and len(jobs["z-minimal"]["indices"]) == 16
    with transformer_lens_4.started(sys.executable, models.hf, jobs, threads=3) as peer:
        assert peer.about == {"transformer_lens": "4.3.0"}
        assert peer.run("z-minimal").tolist() == [16, 3]
        assert peer.run("z-minimal").tolist() == [16, 3]
        with pytest.raises(SystemExit, match="process ended: something broke"):
            peer.run("bad")


def test_a_python_that_is_not_there(models):
    with pytest.raises(SystemExit, match="--tl4-python /no/such/python cannot be run"):
        with transformer_lens_4.started("/no/such/python", models.hf, {}, threads=1):
            pass


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
