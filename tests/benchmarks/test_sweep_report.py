"""What is said of measurements: ratios, notes on slow baselines, README's table."""

import copy

import pytest

from benchmarks import sweep_report as report
from benchmarks.sweep_report import (
    AGAIN,
    FUNCTION,
    HF,
    HF_FORWARD,
    NNSIGHT,
    OURS,
    TL3,
    TL4,
    VERIFIED,
)


def timings(**medians: float) -> dict:
    return {name: {"median": s, "p20": s, "p80": s, "runs": 13} for name, s in medians.items()}


@pytest.fixture
def record() -> dict:
    """A results file with made-up seconds."""
    seconds = timings(
        **{OURS: 0.8, AGAIN: 0.808, VERIFIED: 0.92, FUNCTION: 1.0, HF_FORWARD: 0.06},
        **{HF: 3.6, TL3: 32.0, TL4: 14.0, NNSIGHT: 8.0},
    )
    seconds[HF]["runs"] = 4
    for name in (TL3, TL4, NNSIGHT):
        seconds[name]["runs"] = 2
    generic = {
        "name": "resid_pre",
        "title": "`resid_pre`, generic pair",
        "tokens": 16,
        "first_difference": 1,
        "sites": 192,
        "plan": {"flops": 128_000_000_000},
        "seconds": seconds,
        "scale": {HF: 1.0, TL3: 1.0, TL4: 1.0},
        "flops_per_second": {"linear qkv": 150e9, "linear in": 200e9},
        "reference": {TL3: 31.0, TL4: 13.5, HF: 3.7},
    }
    tenth = copy.deepcopy(generic)
    tenth |= {"name": "z-minimal", "title": "`z`, minimal pair", "tokens": 15, "sites": 2160}
    tenth["scale"] = {HF: 10.0, TL3: 10.0}
    tenth["reference"] = {TL3: 356.0, HF: 40.0}
    del tenth["seconds"][TL4], tenth["seconds"][NNSIGHT]
    about = {"threads": 2, "name": "a processor", "torch": "2", "transformers": "5"}
    peers = {TL3: "transformer-lens 3.9.0", TL4: "transformer-lens 4.3.0"}
    return {"machine": about, "peers": peers, "rows": [generic, tenth]}


def test_ratios(record):
    generic, tenth = record["rows"]
    assert report.ratio(generic, TL3) == pytest.approx(40.0)
    assert report.ratio(generic, TL3, FUNCTION) == pytest.approx(32.0)
    assert report.ratio(tenth, TL3) == pytest.approx(400.0)
    assert report.ratio(tenth, TL4) is None
    assert report.ideal(generic) == pytest.approx(0.64)


def test_slow_baselines_are_explained_before_any_ratio(record):
    row = record["rows"][0]
    assert report.slower_baselines(row) == []
    # 1.2 times what it should take, on a machine that is no slower.
    row["seconds"][TL3]["median"] = 37.2
    (note,) = report.slower_baselines(row)
    assert note.startswith("transformer_lens 3.9 takes 37.2 s, 1.20 x the 31 s of DESIGN section 9")
    assert "takes 1.00 x and matrix products 1.02 x as long, which does NOT explain it" in note
    lines = report.described(row)
    assert "note:" in lines[1] and not any("ratio" in line for line in lines[:2])
    row["seconds"][HF_FORWARD]["median"] = 0.072
    (note,) = report.slower_baselines(row)
    assert note.endswith("takes 1.20 x and matrix products 1.02 x as long")


def test_one_row_as_text(record):
    lines = report.described(record["rows"][1])
    assert lines[0] == "z-minimal: 2160 sites, 15 tokens, first difference at 1"
    assert "ideal 0.640 s (128.0 GFLOP at 200 GFLOP/s), ratio 1.25" in lines[1]
    assert "  hf stacked by hand 36.000 s, 45.00 x (4 runs, from 1/10 of the sites)" in lines
    assert lines[-1] == "  transformer_lens 3.9 / fastlens get_act_patch 320.0 x"


TABLE = """\
| sweep | tokens | sites | fastlens | noise: fastlens again | with the default check | \
TransformerLens 3.9 | TransformerLens 4.3 | Hugging Face, hooks, stacked | nnsight, \
stacked | TransformerLens 3.9 / `get_act_patch_*` | fastlens / ideal |
|---|---|---|---|---|---|---|---|---|---|---|---|
| `resid_pre`, generic pair | 16 | 192 | 0.8 s | 1.01 x | 1.15 x | 40.0 x | 17.5 x | 4.5 x | \
10.0 x | 32.0 x | 1.25 |
| `z`, minimal pair | 15 | 2,160 | 0.8 s | 1.01 x | 1.15 x | 400 x | - | 45.0 x | - | 320 x | \
1.25 |

GPT-2-small shape with random weights, the same in all; float32, batch 1. Columns in x are \
multiples of the time of `patching.sweep(..., verify=False)`, ratios of medians of alternating \
runs; values were compared first. TransformerLens runs its own `get_act_patch_*`, one forward per \
site; Hugging Face runs 16 sites (12 for `z`) stacked in the batch by hand, SDPA, last logits \
only; nnsight as many invokes of one trace. A generic pair differs from its second token on, a \
minimal pair from its eleventh on. Of the largest sweep the others ran a random tenth. Runs of \
each sweep: fastlens 13, Hugging Face 4, TransformerLens 3.9 2, TransformerLens 4.3 2, nnsight 2. \
Ideal: the plan's FLOPs at the fp32 matrix rate measured in the same run. 2 threads, a processor, \
torch 2, transformers 5, transformer-lens 3.9.0 and transformer-lens 4.3.0. Against the machine \
that the targets were set on, a Hugging Face forward of 16 tokens took 1.00 x and matrix products \
1.02 x as long."""


def test_the_table_is_made_of_the_results(record):
    assert report.table(record) == TABLE
    assert "Not measured yet" in report.table(None)


def test_another_model_has_no_part_in_what_is_said_of_the_machine(record):
    real = copy.deepcopy(record["rows"][0])
    real |= {"name": "smollm2", "title": "SmolLM2-135M, `resid_pre`", "reference": {}}
    real["flops_per_second"] = {"linear qkv": 1e9}
    del real["seconds"][HF_FORWARD]
    assert not any("note:" in line for line in report.described(real))
    both = report.table({**record, "rows": [*record["rows"], real]})
    assert "the same in all; SmolLM2-135M has its own, and a pair of sentences; float32" in both
    assert both.endswith(TABLE[-40:])
    alone = report.table({**record, "rows": [real]})
    assert alone.endswith("transformer-lens 3.9.0 and transformer-lens 4.3.0.")


def test_only_the_table_is_rewritten(record):
    text = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    new = report.with_table(text, record)
    assert new.startswith("above\n") and new.endswith("\nbelow\n") and "old" not in new
    assert report.with_table(new, record) == new
    with pytest.raises(SystemExit, match="lacks"):
        report.with_table("no markers", record)


def test_readme_shows_the_committed_results():
    record = report.read_results()
    text = report.README.read_text(encoding="utf-8")
    if record is None and report.BEGIN not in text:
        return
    assert report.with_table(text, record) == text, "run `python benchmarks/sweep.py --readme`"


def test_a_sweep_measured_again_replaces_its_row(record):
    new = {**record, "rows": [{**record["rows"][1], "sites": 1}]}
    found = report.merged(record, new, ["resid_pre", "z-minimal"])
    assert [row["sites"] for row in found["rows"]] == [192, 1]
    assert report.merged(None, new, ["z-minimal"]) == new
    # A peer that was not started this time is still the one of the rows that are kept.
    few = {**new, "peers": {TL3: "transformer-lens 3.9.0"}}
    assert report.merged(record, few, ["resid_pre", "z-minimal"])["peers"] == record["peers"]
    with pytest.raises(SystemExit, match="of another machine or versions"):
        later = {**new, "peers": {TL3: "transformer-lens 3.10.0"}}
        report.merged(record, later, ["resid_pre", "z-minimal"])
    other = {**new, "machine": {"name": "another"}}
    with pytest.raises(SystemExit, match="another machine"):
        report.merged(record, other, ["resid_pre", "z-minimal"])
    assert report.merged({**record, "rows": [record["rows"][1]]}, other, ["z-minimal"]) == other


def test_reading(tmp_path):
    assert report.read_results(tmp_path / "none.json") is None
