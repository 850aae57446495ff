"""Metrics against their definitions, their answers, and how a sweep reads any metric."""

import math
import re

import pytest
import torch

from fastlens.errors import MetricError, SweepError, TokenError
from fastlens.patching.metrics import (
    Metric,
    answer_logit,
    answer_prob,
    cross_entropy,
    kl_divergence,
    logit_diff,
    reading_of,
    token_ids,
)
from tests.close import assert_close_to
from tests.models import ours
from tests.patching.texts import text_model

LOGITS = torch.log(
    torch.tensor(
        [[[0.2, 0.3, 0.5], [0.1, 0.6, 0.3]], [[0.4, 0.4, 0.2], [0.7, 0.2, 0.1]]],
        dtype=torch.float64,
    )
)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (logit_diff(1, 0), [math.log(6), math.log(2 / 7)]),
        (logit_diff(1, 0, position=0), [math.log(1.5), 0.0]),
        (logit_diff([1, 0], [2, 2]), [math.log(2), math.log(7)]),
        (logit_diff(torch.tensor([1, 0]), 2), [math.log(2), math.log(7)]),
        (answer_logit(2), [math.log(0.3), math.log(0.1)]),
        (answer_prob(2), [0.3, 0.1]),
        (answer_prob([1, 2], position=-2), [0.3, 0.2]),
        (cross_entropy(2), [-math.log(0.3), -math.log(0.1)]),
    ],
)
def test_values_per_example(metric, expected):
    assert_close_to(metric(LOGITS), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_logit_difference_ignores_what_all_logits_share_and_probabilities_too():
    for metric in (logit_diff(0, 1), answer_prob(0), cross_entropy(0)):
        assert_close_to(metric(LOGITS + 3.0), metric(LOGITS), atol=1e-12)
    assert_close_to(answer_logit(0)(LOGITS + 3.0), answer_logit(0)(LOGITS) + 3.0, atol=1e-12)


def test_kl_is_from_clean_to_patched():
    clean = LOGITS.flip(0)
    metric = kl_divergence().with_clean(clean)
    p, q = clean[:, -1].exp(), LOGITS[:, -1].exp()
    assert_close_to(metric(LOGITS), (p * (p / q).log()).sum(-1), atol=1e-12)
    assert_close_to(metric(clean), torch.zeros(2, dtype=torch.float64), atol=1e-12)


def test_kl_where_the_clean_run_rules_a_token_out():
    clean = torch.tensor([[[0.0, -torch.inf, 0.0]]])
    metric = kl_divergence().with_clean(clean)
    assert_close_to(metric(clean), [0.0], atol=1e-7)
    assert_close_to(metric(torch.zeros(1, 1, 3)), [math.log(1.5)], atol=1e-6)


def test_units_and_names():
    metrics = [logit_diff(0, 1), answer_logit(0), answer_prob(0), cross_entropy(0), kl_divergence()]
    assert [metric.unit for metric in metrics] == [
        "logits",
        "logits",
        "probability",
        "nats",
        "nats",
    ]
    assert len({metric.name for metric in metrics}) == 5


def test_16_bit_logits_are_widened():
    rows = torch.tensor([[30.0, 29.9]]).to(torch.bfloat16)
    assert answer_prob(0).of_rows(rows).dtype == torch.float32
    assert_close_to(answer_prob(0).of_rows(rows), answer_prob(0).of_rows(rows.double()), atol=1e-6)


# -- positions -----------------------------------------------------------------------------------


def test_one_position_per_example():
    expected = [math.log(0.3), math.log(0.2)]
    for position in ([0, 1], [-2, -1], (0, -1)):
        assert_close_to(answer_logit([1, 1], position=position)(LOGITS), expected, atol=1e-12)
    metric = answer_logit(1, position=[0, -1])
    assert metric.positions(2, 2) == [0, 1]
    assert answer_logit(1, position=[-3]).positions(3, 4) == [1, 1, 1]
    assert answer_logit(1).positions(2, 5) == [4, 4]


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (2, "reads position 2, and the logits have 2 positions"),
        (-3, "reads position -3, and the logits have 2"),
        ([0, 2], "reads position 2"),
        ([0, 1, 1], "has 3 positions for 2 examples. Give one for all, or one for each"),
        ([], "has 0 positions for 2 examples"),
    ],
)
def test_positions_that_do_not_fit(position, message):
    with pytest.raises(MetricError, match=message):
        answer_logit(0, position=position)(LOGITS)


def test_kl_at_a_position_of_each_example():
    clean = LOGITS.flip(0)
    metric = kl_divergence(position=[0, 1]).with_clean(clean)
    p, q = clean[[0, 1], [0, 1]].exp(), LOGITS[[0, 1], [0, 1]].exp()
    assert_close_to(metric(LOGITS), (p * (p / q).log()).sum(-1), atol=1e-12)


# -- many rows at once ---------------------------------------------------------------------------

MANY = {
    "logit_diff": logit_diff([3, 0], [1, 4]),
    "logit_diff, one answer": logit_diff(3, 1),
    "answer_logit": answer_logit([3, 0]),
    "answer_prob": answer_prob([3, 0]),
    "cross_entropy": cross_entropy(3),
    "kl_divergence": kl_divergence(),
}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_many_rows_at_once_are_the_rows_one_by_one(name, dtype):
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    example = torch.tensor([1, 0, 0, 1, 1, 0, 1])
    metric = MANY[name].bind(ours("gpt2"))
    if metric.needs_clean:
        metric = metric.with_clean_rows(torch.randn(2, 5, dtype=dtype))
    found = metric.of_many(rows, example)
    # The whole batch once for each row, with that row at its own example.
    for i, whose in enumerate(example.tolist()):
        alone = metric.of_rows(rows[i].expand(2, -1))[whose]
        assert_close_to(found[i], alone, atol=1e-12 if dtype == torch.float64 else 1e-6)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", [name for name in MANY if MANY[name].is_of_answers])
def test_many_rows_of_the_answers_columns_alone(name):
    rows = torch.randn(4, 5, dtype=torch.float64)
    example = torch.tensor([0, 1, 1, 0])
    metric = MANY[name].bind(ours("gpt2"))
    columns = torch.cat([answer.reshape(-1) for answer in metric.answers]).unique()
    found = metric.of_many(rows[:, columns], example, columns)
    assert_close_to(found, metric.of_many(rows, example), atol=0)


def test_which_metrics_look_at_their_answers_alone():
    assert [MANY[name].is_of_answers for name in MANY] == [True, True, True, False, False, False]


# -- answers -------------------------------------------------------------------------------------


def test_strings_are_looked_up():
    model = text_model()
    ids = token_ids(model, [" cat", "the"])
    assert model.to_str_tokens(ids) == [" cat", "the"]
    bound = logit_diff(" cat", "the").bind(model)
    logits = torch.randn(2, 3, model.cfg.d_vocab_out)
    assert_close_to(bound(logits), logits[:, -1, ids[0]] - logits[:, -1, ids[1]])


def test_an_answer_of_several_tokens_shows_them():
    with pytest.raises(TokenError, match=r"'then'.*2: \['the', 'n'\]"):
        logit_diff("then", " cat").bind(text_model())
    with pytest.raises(TokenError, match=r"' cat'.* is one"):
        answer_prob("cat").bind(text_model())


@pytest.mark.parametrize("answer", [50, -1, [0, 50]])
def test_an_answer_outside_the_vocabulary(answer):
    with pytest.raises(TokenError, match="not in the vocabulary of 50"):
        answer_logit(answer).bind(ours("gpt2"))


def test_no_answer():
    with pytest.raises(TokenError, match="empty"):
        token_ids(ours("gpt2"), [])


def test_calls_that_cannot_work_yet():
    with pytest.raises(MetricError, match="as text"):
        logit_diff(" Paris", " Rome")(LOGITS)
    with pytest.raises(MetricError, match="has not seen"):
        kl_divergence()(LOGITS)
    with pytest.raises(MetricError, match="position 2.*2 positions"):
        answer_logit(0, position=2)(LOGITS)
    with pytest.raises(MetricError, match="3 answers for 2 examples"):
        answer_logit([0, 1, 2])(LOGITS)


# -- reading -------------------------------------------------------------------------------------


def reading(metric, batch=2, n_pos=2):
    return reading_of(metric, ours("gpt2"), n_pos, batch)


def test_only_the_needed_positions_are_read():
    assert reading(logit_diff(0, 1, position=-2)).positions == (0, 0)
    assert reading(logit_diff(0, 1, position=[-1, 0])).positions == (1, 0)
    assert reading(lambda logits: logits.sum()).positions is None


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (lambda logits: logits[:, -1, 0], [math.log(0.1), math.log(0.7)]),
        (lambda logits: logits.exp().sum(), 4.0),
        (lambda logits: 3, 3.0),
        (lambda logits: logits.exp().sum().item(), 4.0),
        (lambda logits: logits[:, -1].argmax(-1), [1.0, 0.0]),
        (lambda logits: torch.tensor(True), 1.0),
    ],
)
def test_a_users_function(metric, expected):
    assert_close_to(reading(metric).of_logits(LOGITS, "run"), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda logits: logits[:, -1], r"returned shape \[2, 3\] for L1 H2"),
        (lambda logits: logits[0, -1], r"shape \[3\].*\[batch\] = \[2\]"),
        (lambda logits: logits[:1, -1, 0], r"shape \[1\]"),
        (lambda logits: None, "returned NoneType"),
        (lambda logits: [1.0, 2.0], "returned list"),
        (lambda logits: torch.tensor(1j), "returned Tensor"),
        (lambda logits: logits.sum() * float("nan"), "returned NaN for L1 H2"),
        (lambda logits: torch.tensor([1.0, float("nan")]), "returned NaN"),
        (lambda logits: float("nan"), "returned NaN"),
    ],
)
def test_what_a_metric_may_not_return(metric, message):
    with pytest.raises(MetricError, match=message):
        reading(metric).of_logits(LOGITS, "L1 H2")


def test_what_is_known_before_any_run():
    with pytest.raises(SweepError, match=re.escape("metric='logit_diff' is no metric")):
        reading("logit_diff")
    with pytest.raises(MetricError, match="reads position 2, and the logits have 2 positions"):
        reading(answer_logit(0, position=2))
    with pytest.raises(MetricError, match="3 positions for 2 examples"):
        reading(answer_logit(0, position=[0, 1, 1]))
    with pytest.raises(MetricError, match="3 answers for 2 examples"):
        reading(answer_logit([0, 1, 2]))


def test_names_and_units_of_any_metric():
    def my_metric(logits):
        return logits.sum()

    assert reading(my_metric).name == "my_metric"
    assert reading(lambda logits: logits.sum()).name == "metric"
    assert reading(my_metric).unit == ""
    assert reading(answer_prob(0)).name == "answer probability (0)"
    assert reading(logit_diff(3, [0, 1])).name == "logit difference"
    assert reading(kl_divergence()).name == "KL from clean"
    assert logit_diff(" a", " b").label == "logit difference (' a' vs ' b')"
    assert not reading(my_metric).normalize
    assert reading(answer_prob(0, normalize=True)).normalize


def test_nan_names_the_first_run():
    read = reading(answer_logit(0))
    values = torch.tensor([[1.0, 2.0], [3.0, float("nan")], [float("nan")] * 2])
    read.refuse_nan(values[:1], ["L0"])
    with pytest.raises(MetricError, match="returned NaN for L1"):
        read.refuse_nan(values, ["L0", "L1", "L2"])


def test_only_metrics_that_compare_get_the_clean_run():
    plain, kl = reading(answer_logit(0)), reading(kl_divergence())
    assert plain.with_clean(LOGITS) is plain
    function = reading(lambda logits: logits.sum())
    assert function.with_clean(LOGITS) is function
    assert_close_to(kl.with_clean(LOGITS).of_logits(LOGITS, "run"), [0.0, 0.0], atol=1e-12)


def test_values_are_kept_in_at_least_32_bits():
    read = reading(lambda logits: logits[:, -1, 0])
    assert read.of_logits(LOGITS.to(torch.bfloat16), "run").dtype == torch.float32
    assert read.of_logits(LOGITS, "run").dtype == torch.float64
    assert reading(lambda logits: 3).of_logits(LOGITS, "run").dtype == torch.float64


def test_gradients_pass_where_there_are_any():
    read = reading(lambda logits: logits[:, -1, 0])
    leaf = LOGITS.clone().requires_grad_()
    assert read.of_logits(leaf, "run").requires_grad
    assert not read.of_logits(LOGITS, "run").requires_grad


def test_a_metric_is_a_value():
    metric = logit_diff(0, 1, position=3, normalize=True)
    assert isinstance(metric, Metric)
    assert (metric.answers, metric.position, metric.normalize) == ((0, 1), 3, True)
    with pytest.raises(AttributeError):
        metric.position = 0
