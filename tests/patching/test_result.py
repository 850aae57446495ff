"""From values of runs to scores: several metrics, fractions, examples, tolerances."""

import math

import pytest
import torch

from fastlens.errors import MetricError, SweepError
from fastlens.patching import (
    answer_logit,
    answer_prob,
    execute,
    kl_divergence,
    logit_diff,
    plan,
    sweep,
)
from fastlens.patching.result import TOLERANCE, Outcome, refuse_if_wrong, scores_of, tolerance_of
from fastlens.scores import Scores
from tests.close import assert_close_to
from tests.models import ours, prompts

METRIC = logit_diff(7, 3)
DIRECTIONS = ("denoising", "noising")


def pair(batch=3, n_pos=5):
    clean = prompts(batch, n_pos)
    corrupted = clean.clone()
    for example in range(batch):
        at = example % (n_pos - 1)
        corrupted[example, at] = (corrupted[example, at] + 7) % 50
    return clean, corrupted


def mean_logit(logits):
    return logits[:, -1].mean()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_several_metrics_are_each_as_alone(direction):
    model = ours("llama", dtype=torch.float64)
    clean, corrupted = pair()
    metrics = {
        "difference": METRIC,
        "fraction": logit_diff(7, 3, normalize=True),
        "KL": kl_divergence(),
        "probability": answer_prob(7, position=2),
    }
    options = {"sites": "z", "direction": direction}
    together = sweep(model, clean, corrupted, metric=metrics, **options)
    assert together.axes == ("metric", "layer", "head")
    assert together.labels["metric"] == list(metrics)
    assert len(together.certificate["by_metric"]) == 4
    for name, metric in metrics.items():
        alone = sweep(model, clean, corrupted, metric=metric, **options)
        part = together.select(metric=name)
        assert_close_to(part.values, alone.values, atol=1e-12, name=name)
        assert_close_to(part.per_example, alone.per_example, atol=1e-12, name=name)
        assert_close_to(part.standard_error, alone.standard_error, atol=1e-12, name=name)
        assert part.unit == alone.unit and part.reference == pytest.approx(alone.reference)
        assert part.baselines == pytest.approx(alone.baselines)


def test_metrics_with_and_without_examples_share_values_only():
    scores = sweep(ours("gpt2"), *pair(), metric=[METRIC, mean_logit, METRIC], by="layer")
    assert scores.labels["metric"] == [
        "logit difference (7 vs 3) #1",
        "mean_logit",
        "logit difference (7 vs 3) #2",
    ]
    assert scores.per_example is None and scores.values.shape == (3, 3)
    assert torch.equal(scores.values[0], scores.values[2])


def test_several_metrics_are_shown_and_kept(tmp_path):
    scores = sweep(ours("gpt2"), *pair(), metric=[METRIC, kl_divergence()], out=tmp_path)
    loaded = Scores.load(tmp_path)
    assert torch.equal(loaded.values, scores.values) and loaded.by_metric == scores.by_metric
    text = scores.table(3)
    assert "logits" in text and "nats" in text and "mean of 3 examples" in text
    assert scores.table(3) == loaded.table(3)


def test_examples_keep_what_the_mean_hides():
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair()
    scores = sweep(model, clean, corrupted, metric=METRIC)
    for example in range(3):
        one = slice(example, example + 1)
        alone = sweep(model, clean[one], corrupted[one], metric=METRIC)
        assert_close_to(scores.per_example[example], alone.values, atol=1e-12)
        assert alone.per_example.shape == (1, 3, 5) and alone.standard_error is None
    assert_close_to(scores.standard_error, scores.per_example.std(0) / math.sqrt(3), atol=1e-12)
    low, high = scores.interval(resamples=200)
    assert bool((low <= scores.values + 1e-12).all() and (scores.values <= high + 1e-12).all())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("wish", [True, False])
def test_normalize_overrules_the_metric(direction, wish):
    model = ours("gpt2", dtype=torch.float64)
    options = {"direction": direction, "by": "layer"}
    said = sweep(model, *pair(), metric=logit_diff(7, 3, normalize=wish), **options)
    overruled = sweep(
        model, *pair(), metric=logit_diff(7, 3, normalize=not wish), normalize=wish, **options
    )
    assert torch.equal(said.values, overruled.values) and said.unit == overruled.unit
    function = sweep(model, *pair(), metric=mean_logit, normalize=True, **options)
    # All of layer 0 patched is the other run.
    assert function.values[0] == pytest.approx(1.0 - function.reference, abs=1e-9)


def test_prompts_without_a_gap_in_one_of_several_metrics():
    clean, _ = pair()
    with pytest.raises(MetricError, match="fractions of their gap mean nothing"):
        sweep(ours("gpt2"), clean, clean, metric=[METRIC, logit_diff(7, 3, normalize=True)])


def test_infinite_metrics_have_no_fractions_and_nan_is_named():
    def infinite(logits):
        return logits[:, -1, 0] * 0 + math.inf

    def broken(logits):
        return (logits[:, -1, 0] * 0 + math.inf) * 0

    model = ours("gpt2")
    assert bool(sweep(model, *pair(), metric=infinite, verify="all").values.isinf().all())
    with pytest.raises(MetricError, match="mean nothing"):
        sweep(model, *pair(), metric=infinite, normalize=True)
    with pytest.raises(MetricError, match="'broken' returned NaN for the base run"):
        sweep(model, *pair(), metric=broken)


def outcome_of(query, value, base=1.0):
    n = len(query.runs)
    values = [torch.full((n, 3), value)]
    stems = torch.full((3,), base), torch.full((3,), base + 2.0)
    return Outcome(values, [stems[0]], [stems[1]], {})


@pytest.mark.parametrize(
    ("dtype", "base", "tolerance"),
    [
        (torch.float32, 1.0, 2e-4),
        (torch.float32, 1e4, 1e-2),
        (torch.float64, 1.0, 2e-12),
        (torch.bfloat16, 1.0, 0.5),
    ],
)
def test_the_tolerance_grows_with_the_gap_and_with_large_metrics(dtype, base, tolerance):
    query = plan(ours("gpt2", dtype=dtype), *pair(), metric=METRIC)
    assert tolerance_of(query, outcome_of(query, 0.0, base), 0) == pytest.approx(tolerance)
    assert TOLERANCE[dtype] <= tolerance


@pytest.mark.parametrize(
    ("difference", "is_refused"), [(1e-5, False), (1e-2, True), (math.nan, True)]
)
def test_what_differs_is_refused_with_the_scores(difference, is_refused):
    query = plan(ours("gpt2"), *pair(), metric=METRIC)
    outcome = outcome_of(query, 0.5)
    outcome.certificate.update(max_difference=difference, tolerance=1e-4, runs=1)
    scores = scores_of(query, outcome)
    if not is_refused:
        refuse_if_wrong(scores)
        return
    with pytest.raises(SweepError, match="strategy: wave") as caught:
        refuse_if_wrong(scores)
    assert caught.value.scores is scores


def test_scores_know_where_they_come_from():
    model = ours("llama")
    query = plan(model, *pair(), sites=["z", "q"], metric=answer_logit(3), direction="noising")
    scores = execute(query)
    assert scores.axes == ("site", "layer", "head") and scores.labels["site"] == ["z", "q"]
    assert scores.title == "noising z, q, answer logit (3)" and scores.unit == "logits"
    assert scores.meta["sites"] == ["z", "q"] and scores.meta["direction"] == "noising"
    assert scores.meta["clean"] == scores.meta["clean_tokens"] == pair()[0].tolist()
    assert scores.reference == scores.baselines["clean"] == scores.meta["clean_metric"]
