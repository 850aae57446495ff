"""Plans of sweeps: what they say, and that what they say is what is done."""

import textwrap

import pytest
import torch

from fastlens.components.block import TransformerBlock
from fastlens.errors import SweepError
from fastlens.patching import Patch, execute, logit_diff, plan
from fastlens.patching.plan import COUNTED
from fastlens.patching.wave import Wave
from tests.models import ours, prompts

METRIC = logit_diff(7, 3)
NULL = "the new values are the old ones (the prompts agree so far, or values are equal)"


def pair(n_pos=5, first=2, batch=1):
    clean = prompts(batch, n_pos)
    corrupted = clean.clone()
    corrupted[:, first] = (corrupted[:, first] + 7) % 50
    return clean, corrupted


# -- what is said --------------------------------------------------------------------------------


def said(text):
    return textwrap.dedent(text).strip("\n")


def test_a_plan_of_the_wave_in_words():
    query = plan(
        ours("gpt2"), *pair(), sites=["resid_pre", "resid_post"], metric=METRIC, memory=101_000_000
    )
    assert query.explain() == said("""
        30 runs of resid_pre, resid_post, denoising, 1 pair of 5 tokens
        strategy: wave
        computed: 10 runs in 1 chunk
        skipped: 8 null: NULL
        skipped: 2 dead: no logit that is read can see them
        skipped: 10 same: equal to another run (resid_post is the next layer's resid_pre)
        first difference of the pairs: position 2
        logits read: positions 4; up to 2 vocabulary columns
        layer  joins  rows in attention  rows in MLP  GFLOP
            0      3                 11           14  0.000332
            1      3                 17           20  0.000483
            2      4                  9           11  0.000322
        work: 0.00114 GFLOP; one forward per run would take 0.0113 (9.96 x)
        memory: at most 96.2 KiB predicted, of 96.3 MiB allowed
    """).replace("NULL", NULL)
    assert str(query) == repr(query) == query.explain()


def test_a_bidirectional_plan_in_words():
    query = plan(ours("bidirectional"), *pair(), metric=METRIC, memory="200MB")
    lines = query.explain().splitlines()
    assert lines[:3] == [
        "10 runs of resid_pre, denoising, 1 pair of 5 tokens",
        "strategy: layer skip, because attention is bidirectional: a patch reaches every position",
        "computed: 10 runs in 1 chunk",
    ]
    # Every row of a run is its own from its first attention on.
    assert lines[-4].split()[:4] == ["0", "5", "15", "35"]


def test_slower_ways_in_words():
    clean, corrupted = pair(batch=2)
    model = ours("gpt2")
    model.add_hook("blocks.1.hook_resid_pre", lambda x, hook: x)
    head = "15 runs of resid_pre, denoising, 2 pairs of 5 tokens\nstrategy: "
    alone = plan(model, clean, corrupted, metric=METRIC).explain()
    assert alone.startswith(f"{head}one forward per run, because hooks are on 1 module")
    assert alone.count("\n") == 1 and "blocks.1.hook_resid_pre" in alone
    model.reset_hooks()
    model.blocks[1].mlp = torch.nn.Sequential()
    stacked = plan(model, clean, corrupted, metric=METRIC).explain()
    assert stacked == (
        f"{head}stacked forwards, because blocks.1.mlp is a Sequential, and what it computes is "
        f"not known"
    )
    gradients = plan(ours("gpt2"), clean, corrupted, metric=METRIC, gradients=True).explain()
    assert gradients == f"{head}one forward per run, because gradients were asked for"


def test_an_identity_in_the_place_of_an_mlp_is_foreign():
    model = ours("gpt2", dtype=torch.float64)
    model.blocks[1].mlp = torch.nn.Identity()
    query = plan(model, *pair(), metric=METRIC)
    assert query.strategy.name == "stacked forwards" and "blocks.1.mlp" in query.strategy.because
    assert execute(query, verify="all").certificate["max_difference"] <= 1e-12
    # The norms of a model without norms are identities of ours.
    assert plan(ours("no_norm"), *pair(), metric=METRIC).strategy.is_wave


# -- what is said is what is done ----------------------------------------------------------------


@pytest.mark.parametrize("sites", ["resid_pre", "z", ["attn_out", "mlp_out"], "pattern"])
def test_predicted_rows_are_the_rows_that_run(monkeypatch, sites):
    executed = []
    run = Wave.run

    def recording(self, *args):
        final = run(self, *args)
        executed.append(final.counts)
        return final

    monkeypatch.setattr(Wave, "run", recording)
    query = plan(ours("llama"), *pair(n_pos=6, batch=2), sites=sites, metric=METRIC)
    scores = execute(query, verify=0)
    assert scores.plan == query.summary()
    total = sum(executed).sum(0).tolist()
    assert query.summary()["rows"] == dict(zip(COUNTED, total, strict=True))
    by_layer = [line.split() for line in query.explain().splitlines() if line[:5].strip().isdigit()]
    # The layers are the lines with five columns; the first line of the text has a number too.
    rows = [line for line in by_layer if len(line) == 5]
    assert [int(line[2]) for line in rows] == sum(executed)[:, 1].tolist()
    assert [int(line[3]) for line in rows] == sum(executed)[:, 3].tolist()


def test_the_summary_adds_up():
    query = plan(ours("gpt2"), *pair(), sites=["resid_pre", "resid_post"], metric=METRIC)
    summary = query.summary()
    kinds = ("computed", "null", "dead", "same")
    assert sum(summary[kind] for kind in kinds) == summary["runs"] == len(query.runs)
    assert summary["flops_one_by_one"] > summary["flops"] > 0


def test_planning_runs_no_layer_and_draws_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was run")

    model = ours("gpt2")
    plain_call = torch.nn.Module.__call__

    def no_block(self, *args, **kwargs):
        return refuse() if isinstance(self, TransformerBlock) else plain_call(self, *args, **kwargs)

    # Not on the block's class: a method replaced there is a reason not to run the wave.
    monkeypatch.setattr("torch.nn.Module.__call__", no_block)
    before = torch.get_rng_state()
    query = plan(model, *pair(batch=3), sites="z", metric=METRIC, source="resample", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert query.seed == 3 and query.strategy.name == "wave"


def test_the_default_memory_is_half_of_the_free(monkeypatch):
    monkeypatch.setattr("fastlens.patching.budget.free_bytes", lambda device: 3 * 2**30)
    assert plan(ours("gpt2"), *pair(), metric=METRIC).memory == 3 * 2**29
    assert plan(ours("gpt2"), *pair(), metric=METRIC, memory="1.5GiB").memory == 3 * 2**29


def test_the_smallest_memory_that_is_said_works_and_no_less():
    model, (clean, corrupted) = ours("gpt2"), pair(n_pos=8)
    with pytest.raises(SweepError, match="too little") as caught:
        plan(model, clean, corrupted, metric=METRIC, memory="20KB")
    least = int(str(caught.value).rsplit("at least ", 1)[1].rstrip(".").replace(",", ""))
    assert plan(model, clean, corrupted, metric=METRIC, memory=least).summary()["chunks"] > 3
    with pytest.raises(SweepError, match="too little"):
        plan(model, clean, corrupted, metric=METRIC, memory=least - 1)


def test_a_plan_can_be_run_twice():
    query = plan(ours("llama"), *pair(), sites="v", metric=METRIC)
    first, second = execute(query), execute(query, verify="all")
    assert torch.equal(first.values, second.values)


def test_one_function_in_a_dict_is_a_metric_axis():
    query = plan(ours("gpt2"), *pair(), metric={"mine": METRIC}, runs=[Patch("z", 0)])
    scores = execute(query)
    assert scores.axes == ("metric", "run") and scores.labels["metric"] == ["mine"]
