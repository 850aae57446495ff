"""From a wave's last rows to metrics: what is read, and what is done when that was not foreseen."""

import pytest
import torch

from fastlens.errors import MetricError
from fastlens.patching import kl_divergence, logit_diff, sweep
from fastlens.patching.evaluate import keeping_all, merged, wants_of
from fastlens.patching.metrics import reading_of
from tests.models import ours, prompts

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
