"""From a wave's last rows to metrics: what is read, and what is done when that was not foreseen."""

import pytest
import torch

from fastlens.errors import MetricError
from fastlens.patching import (
    Patch,
    answer_logit,
    answer_prob,
    cross_entropy,
    evaluate,
    kl_divergence,
    logit_diff,
    plan,
    sweep,
)
from fastlens.patching.evaluate import keeping_all, merged, wants_of
from fastlens.patching.metrics import reading_of
from tests.models import ours, prompts
from tests.patching.against_hooks import hooked_logits

CPU = torch.device("cpu")


def pair(batch=2, n_pos=8):
    clean = prompts(batch, n_pos)
    corrupted = clean.clone()
    for example in range(batch):
        corrupted[example, 3 + example] = (corrupted[example, 3 + example] + 5) % 50
    return clean, corrupted


def wants(metric, batch=2, n_pos=8):
    model = ours("gpt2")
    return wants_of(reading_of(metric, model, n_pos, batch), n_pos, 50, torch.float32, CPU)


def test_what_metrics_read():
    found = wants(logit_diff(7, 3, position=[2, -1]))
    assert found.positions == (2, 7) and found.columns.tolist() == [3, 7]
    found = wants(lambda logits: logits[:, -1, 4] - logits[:, 2, 9])
    assert found.positions == (2, 7) and found.columns.tolist() == [4, 9]
    assert wants(kl_divergence()).columns is None
    everything = wants(lambda logits: logits.log_softmax(-1)[:, :, 0].mean(1))
    assert everything.positions == tuple(range(8)) and everything.columns is None
    assert wants(lambda logits: 1 / 0).positions is None
    assert merged([found, everything], 8, 50) == (tuple(range(8)), 50)
    assert keeping_all([found])[0].positions is None


def test_a_metric_of_the_wrong_shape_is_refused_before_anything_runs():
    with pytest.raises(MetricError, match=r"returned shape \[2, 50\] for zero logits"):
        wants(lambda logits: logits[:, -1])


def by_argmax(logits):
    row = int(logits[0, -1].argmax()) % 8
    return logits[:, row, 3] + logits[:, -1, 2]


def by_sign(logits):
    return logits[:, 2, 3] if float(logits[0, -1, 4]) < -0.6 else logits[:, -1, 2]


METRICS = {
    "argmax": by_argmax,
    "sign": by_sign,
    "early": lambda logits: logits[:, 0, 1],
    "all": lambda logits: logits.log_softmax(-1)[:, :, 3].mean(1),
    "scalar": lambda logits: logits[0, -1, 3] - logits[1, -1, 5],
}


@pytest.mark.parametrize("name", METRICS)
def test_every_run_equals_the_run_alone(name):
    clean, corrupted = pair()
    scores = sweep(
        *(ours("gpt2"), clean, corrupted),
        sites=["resid_pre", "resid_post"],
        by=("layer", "pos"),
        metric=METRICS[name],
        verify="all",
        progress=False,
    )
    assert scores.certificate["max_difference"] < 1e-5
    assert (scores.per_example is None) == (name == "scalar")


def test_nan_is_named():
    clean, corrupted = pair()

    def bad(logits):
        value = logits[:, -1, 0]
        return value / 0 * 0 if bool((value != 0).any()) else value

    with pytest.raises(MetricError, match="returned NaN for the base run"):
        sweep(ours("gpt2"), clean, corrupted, metric=bad, progress=False)


# -- against the same function of hooked runs' whole logits --------------------------------------


RUNS = {
    "null": Patch("resid_pre", 0, pos=1),
    "dead": Patch("mlp_out", 2, pos=4),
    "dead row": Patch("resid_post", 2, pos=[2, 5], source="zero"),
    "partly dead": [
        Patch("mlp_out", 2, pos=4, source=0.3),
        Patch("mlp_out", 2, pos=-1, source=0.3),
    ],
    "live": Patch("resid_pre", 1, pos=4),
    "early": Patch("v", 0, pos=[3, 4]),
    "late": Patch("z", 2, pos=-1),
    "again": Patch("resid_post", 0, pos=4),
}


def assert_as_whole_logits(name, metric, batch=2, runs=RUNS, reference=None, **options):
    """Every run's value is the function of its hooked run's logits, all computed."""
    model = ours(name, dtype=torch.float64, n_layers=3)
    clean, corrupted = pair(batch)
    scores = sweep(
        model, clean, corrupted, runs=runs, metric=metric, verify=0, progress=False, **options
    )
    every = plan(model, clean, corrupted, runs=runs, metric=lambda x: x.mean((1, 2)))
    assert len(every.plan.frame.needed) == 8
    function = reference or metric
    expected = torch.stack([function(logits) for logits in hooked_logits(every)])
    got = scores.values if scores.per_example is None else scores.per_example.T
    assert got.shape == expected.shape
    assert float((got - expected.double()).abs().max()) <= 1e-12
    return scores


def accuracy(logits):
    return (logits[:, -1].argmax(-1) == 17).float()


def loss_of_all(logits):
    return -logits.log_softmax(-1)[:, :-1].gather(2, prompts(2, 8)[:, 1:, None])[:, :, 0].mean(1)


FUNCTIONS = {
    "last logit": lambda logits: logits[:, -1, 3],
    "last row": lambda logits: logits[:, -1].softmax(-1).square().sum(-1),
    "several rows": lambda logits: logits[:, [1, 4, -1], 5].sum(1),
    "a slice": lambda logits: logits[:, 2:5, 3:9].mean((1, 2)),
    "all": lambda logits: logits.logsumexp(-1).mean(-1),
    "loss of all": loss_of_all,
    "accuracy": accuracy,
    "top": lambda logits: logits[:, -1].topk(3).values.sum(-1),
    "own rows": lambda logits: logits[torch.arange(2), torch.tensor([3, 6]), [7, 8]],
    "scalar": lambda logits: logits[:, -1, 3].mean(),
    "product of examples": lambda logits: logits[0, -1, 3] * logits[1, -1, 4],
    "python number": lambda logits: float(logits[0, -1, 3]),
    "through numpy": lambda logits: torch.tensor(logits.detach().numpy()[:, -1, 3]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_every_kind(name):
    function = FUNCTIONS[name]
    reference = function
    if name == "python number":

        def reference(logits):
            return torch.tensor(function(logits), dtype=torch.float64)

    assert_as_whole_logits("gpt2", function, reference=reference)


@pytest.mark.parametrize("name", ["gpt2", "llama", "softcap", "neox"])
def test_kl_from_a_fixed_run_as_users_write_it(name):
    model = ours(name, dtype=torch.float64, n_layers=3)
    with torch.no_grad():
        clean = model(pair()[0]).log_softmax(-1)

    def kl(logits):
        return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)[:, -1]

    scores = assert_as_whole_logits(name, kl)
    library = sweep(model, *pair(), runs=RUNS, metric=kl_divergence(), verify=0)
    assert float((scores.per_example - library.per_example).abs().max()) <= 1e-12


@pytest.mark.parametrize("name", ["softcap", "llama"])
@pytest.mark.parametrize(
    "metric",
    [
        logit_diff([7, 5], [3, 4]),
        answer_logit(6, position=[2, -1]),
        answer_prob([7, 8], position=-2),
        cross_entropy(9),
    ],
)
def test_metrics_per_example_and_soft_capped(name, metric):
    assert_as_whole_logits(name, metric.bind(ours(name)))


def rows_by_content(logits):
    """On zeros it reads the last row; on real logits it reads where the first example peaks."""
    best = int(logits[0, -1].argmax())
    row = -1 if best == 0 else best % 5
    return logits[:, row, 3] - logits[:, -1, 4]


def rows_by_run(logits):
    """Reads as the base run did, but for some of the runs."""
    row = -1 if float(logits[0, -1, 3]) <= BASE[0] + 1e-9 else 4
    return logits[:, row, 3]


BASE = [0.0]


@pytest.mark.parametrize("memory", [None, "tight"])
@pytest.mark.parametrize("batch", [1, 2])
def test_reads_that_were_not_foreseen(batch, memory):
    """Then runs are finished again with all rows, those that were dead before among them."""
    options = {}
    if memory == "tight":
        model = ours("gpt2", dtype=torch.float64, n_layers=3)
        full = plan(model, *pair(batch), runs=RUNS, metric=lambda x: x.mean((1, 2)))
        options["memory"] = full.plan.least_bytes
    scores = assert_as_whole_logits("gpt2", rows_by_content, batch, **options)
    effects = (scores.values - scores.reference).abs()
    assert effects[0] == 0.0 and scores.values[7] != scores.reference
    for run in RUNS:
        assert_as_whole_logits("gpt2", rows_by_content, batch, {run: RUNS[run]}, **options)


def test_dead_runs_are_dead_no_more_where_another_row_is_read():
    """Zero logits send it to the last row, real ones to the row that the dead patch is in."""

    def metric(logits):
        row = -1 if bool((logits[:, -1] == 0).all()) else 4
        return logits[:, row, 3]

    scores = assert_as_whole_logits("gpt2", metric)
    assert abs(float(scores.values[1] - scores.reference)) > 1e-6


def test_reads_that_differ_from_run_to_run():
    model = ours("gpt2", dtype=torch.float64, n_layers=3)
    with torch.no_grad():
        BASE[0] = float(model(pair()[1])[0, -1, 3])
    assert_as_whole_logits("gpt2", rows_by_run)


@pytest.mark.parametrize("limit", [1, 4096])
def test_logits_made_in_parts_are_the_same(limit, monkeypatch):
    """A part may hold rows of one example only."""
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = pair(3)
    metrics = [
        *(logit_diff([7, 5, 2], [3, 4, 1]), answer_prob([1, 2, 3]), kl_divergence()),
        *(cross_entropy([4, 5, 6], position=[-1, 5, 6]), lambda x: x[:, -1].logsumexp(-1)),
    ]
    options = {"sites": "resid_pre", "metric": metrics, "verify": 0, "progress": False}
    whole = sweep(model, clean, corrupted, **options)
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", limit)
    parts = sweep(model, clean, corrupted, **options)
    assert float((whole.per_example - parts.per_example).abs().max()) <= 1e-12


def test_several_metrics_at_once_are_each_alone():
    model = ours("llama", dtype=torch.float64)
    clean, corrupted = pair()
    metrics = {
        "difference": logit_diff(7, 3),
        "row": lambda logits: logits[:, 2, 5],
        "moves": rows_by_content,
        "all": lambda logits: logits.logsumexp(-1).mean(-1),
        "normalised": answer_logit(4, normalize=True),
    }
    together = sweep(model, clean, corrupted, runs=RUNS, metric=metrics, verify="all")
    assert together.axes == ("metric", "run") and together.labels["metric"] == list(metrics)
    for number, metric in enumerate(metrics.values()):
        alone = sweep(model, clean, corrupted, runs=RUNS, metric=metric, verify=0)
        assert float((together.values[number] - alone.values).abs().max()) <= 1e-12


def test_nan_in_one_run_is_named():
    clean, corrupted = pair()
    runs = {"fine": Patch("z", 0, pos=4), "broken": Patch("resid_post", 2, pos=-1, source=1e400)}
    for metric in (logit_diff(7, 3), lambda logits: logits[:, -1, 3]):
        with pytest.raises(MetricError, match="NaN for run broken"):
            sweep(ours("gpt2"), clean, corrupted, runs=runs, metric=metric, progress=False)


def test_a_scalar_for_some_runs_and_a_batch_for_others_is_refused():
    clean, corrupted = pair()
    model = ours("gpt2", dtype=torch.float64)
    with torch.no_grad():
        base = float(model(corrupted)[0, -1, 3])

    def metric(logits):
        value = logits[:, -1, 3]
        return value if abs(float(value[0]) - base) < 1e-9 else value.mean()

    with pytest.raises(MetricError, match="a scalar for some runs"):
        sweep(model, clean, corrupted, runs=RUNS, metric=metric, progress=False)
