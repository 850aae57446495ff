"""Intervals of means: against enumeration, a plain loop, and how often they hold the truth."""

import itertools
import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from fastlens import bootstrap
from fastlens.bootstrap import mean_interval
from fastlens.errors import FastlensError, ShapeError
from tests.close import assert_close_to

METHODS = ["bca", "percentile"]
NORMAL = NormalDist()


def drawn(n, resamples, seed):
    """Which examples are in each resample, read back from means of indicator cells."""
    counts = np.concatenate([c for _, c in bootstrap._counts(n, resamples, seed)])
    assert counts.shape == (resamples, n)
    assert (counts.sum(1) == n).all()
    return counts


def looped(samples, level, resamples, seed, method):
    """One cell at a time, by the formulas as Efron & Tibshirani print them (14.10 to 14.15)."""
    n = len(samples)
    counts = drawn(n, resamples, seed)
    ends = []
    for x in samples.T:
        means = [sum(c * v for c, v in zip(row, x, strict=True)) / n for row in counts]
        levels = [(1 - level) / 2, (1 + level) / 2]
        if method == "bca":
            ties = [m for m in means if math.isclose(m, x.mean(), rel_tol=1e-9, abs_tol=1e-12)]
            below = sum(m < x.mean() for m in means if m not in ties) + len(ties) / 2
            bias = NORMAL.inv_cdf(below / resamples)
            without = [np.delete(x, i).mean() for i in range(n)]
            off = [np.mean(without) - w for w in without]
            skew = sum(d**3 for d in off) / (6 * sum(d**2 for d in off) ** 1.5)
            moved = [bias + NORMAL.inv_cdf(share) for share in levels]
            levels = [NORMAL.cdf(bias + m / (1 - skew * m)) for m in moved]
        ends.append(np.quantile(means, levels))
    return np.array(ends).T


@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_a_loop_over_cells_gives(method):
    random = np.random.default_rng(1)
    samples = np.stack(
        [random.normal(size=9), random.exponential(size=9) * 1e-6, random.integers(0, 2, 9) + 5.0],
        axis=1,
    )
    found = mean_interval(samples, 0.9, 400, 3, method)
    assert_close_to(np.stack(found), looped(samples, 0.9, 400, 3, method), atol=1e-9)


def test_percentiles_of_all_possible_resamples():
    """Three examples have 27 resamples; many draws come near their exact quantiles."""
    x = np.array([0.0, 1.0, 5.0])
    exact = np.sort([np.mean(pick) for pick in itertools.product(x, repeat=3)])
    low, high = mean_interval(x[:, None], 0.8, 60_000, 0, "percentile")
    shares = [(exact <= end + 1e-9).mean() for end in (low[0], high[0])]
    inside = [(exact < end - 1e-9).mean() for end in (low[0], high[0])]
    assert inside[0] <= 0.1 <= shares[0]
    assert inside[1] <= 0.9 <= shares[1]


def test_bca_of_all_possible_resamples():
    """Five examples have 3,125 resamples; in exact numbers, so that ties with the mean are ties."""
    x = np.random.default_rng(3).normal(size=5)
    exact = [Fraction(value) for value in x]
    mean = sum(exact) / 5
    means = [sum(pick) / 5 for pick in itertools.product(exact, repeat=5)]
    ties = sum(value == mean for value in means)
    assert ties >= math.factorial(5)
    bias = NORMAL.inv_cdf((sum(value < mean for value in means) + ties / 2) / len(means))
    off = x - x.mean()
    skew = (off**3).sum() / 6 / (off**2).sum() ** 1.5
    moved = [bias + NORMAL.inv_cdf(share) for share in (0.025, 0.975)]
    levels = [NORMAL.cdf(bias + m / (1 - skew * m)) for m in moved]
    ends = np.quantile(np.array(means, dtype=np.float64), levels)
    found = np.concatenate(mean_interval(x[:, None], 0.95, 100_000))
    assert_close_to(found, ends, atol=0.01 * x.std())


def test_bca_moves_towards_the_long_tail():
    x = np.random.default_rng(0).exponential(size=(25, 40))
    plain = mean_interval(x, method="percentile")
    moved = mean_interval(x)
    assert (moved[0] > plain[0]).mean() > 0.9
    assert (moved[1] > plain[1]).mean() > 0.9


@pytest.mark.parametrize(("method", "least"), [("bca", 0.91), ("percentile", 0.91)])
def test_intervals_hold_the_truth_as_often_as_they_say(method, least):
    x = np.random.default_rng(0).normal(1.0, 2.0, size=(40, 1500))
    low, high = mean_interval(x, 0.95, 500, 0, method)
    assert least <= ((low <= 1.0) & (high >= 1.0)).mean() <= 0.97


def test_the_normal_interval_is_near():
    x = np.random.default_rng(0).normal(size=(200, 50))
    low, high = mean_interval(x, 0.95, 4000)
    error = x.std(0, ddof=1) / math.sqrt(200)
    assert_close_to(low, x.mean(0) - 1.96 * error, atol=0.015)
    assert_close_to(high, x.mean(0) + 1.96 * error, atol=0.015)


@pytest.mark.parametrize("method", METHODS)
def test_equal_examples_have_no_width_exactly(method):
    low, high = mean_interval(np.full((7, 2), 0.1), method=method)
    assert (low == 0.1).all()
    assert (high == 0.1).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_shift_and_a_scale_carry_over(method):
    x = np.random.default_rng(0).normal(size=(12, 3))
    low, high = mean_interval(x, method=method)
    moved = mean_interval(x * 1e-200, method=method)
    assert_close_to(moved[0] * 1e200, low, atol=1e-12)
    turned = mean_interval(1e6 - x, method="percentile")
    assert_close_to(mean_interval(x, method="percentile")[1], 1e6 - turned[0], atol=1e-8)
    assert (low < x.mean(0)).all()
    assert (high > x.mean(0)).all()


def test_one_outlier_in_thousands_stays_finite():
    x = np.zeros((5000, 1))
    x[0] = 1.0
    low, high = mean_interval(x, 0.999, 2000)
    assert 0 <= low[0] <= 2e-4 <= high[0] <= 2e-3


def test_numbers_that_are_none_stay_in_their_cell():
    x = np.random.default_rng(0).normal(size=(6, 4))
    whole = mean_interval(x)
    x[0, 1], x[2, 2] = np.nan, np.inf
    low, high = mean_interval(x)
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [False, True, True, False]
    assert (low[[0, 3]] == whole[0][[0, 3]]).all()


def test_the_seed_decides():
    x = np.random.default_rng(0).normal(size=(10, 3))
    first, again, other = (mean_interval(x, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_chunks_change_nothing(monkeypatch):
    x = np.random.default_rng(0).normal(size=(10, 37)).astype(np.float32)
    whole = mean_interval(x, resamples=300)
    monkeypatch.setattr(bootstrap, "MEANS_HELD", 300 * 5)
    assert_close_to(np.stack(mean_interval(x, resamples=300)), np.stack(whole), atol=1e-12)
    monkeypatch.setattr(bootstrap, "COUNTS_HELD", 10 * 7)
    assert [len(c) for _, c in bootstrap._counts(10, 16, 0)] == [7, 7, 2]
    assert all(a < b for a, b in zip(*mean_interval(x, resamples=300), strict=True))


def test_resamples_draw_every_example_alike():
    counts = drawn(5, 20_000, 0)
    assert_close_to(counts.mean(0), np.ones(5), atol=0.03)
    # Binomial: 5 draws, each with a chance of 1/5.
    assert_close_to(counts.var(0), np.full(5, 0.8), atol=0.03)


def test_no_cells():
    low, high = mean_interval(np.zeros((3, 0)))
    assert low.shape == high.shape == (0,)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_examples(n):
    with pytest.raises(ShapeError, match=f"at least two examples; got {n}"):
        mean_interval(np.zeros((n, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0.0}, "level=0.0"),
        ({"level": 95.0}, "between 0 and 1"),
        ({"method": "normal"}, "method='normal'"),
        ({"resamples": 39}, "at least 40"),
        ({"resamples": 1000, "level": 0.999}, "at least 2000"),
    ],
)
def test_options_that_make_no_interval(options, message):
    with pytest.raises(FastlensError, match=message):
        mean_interval(np.zeros((3, 2)), **options)
    mean_interval(np.zeros((3, 2)), resamples=40)
