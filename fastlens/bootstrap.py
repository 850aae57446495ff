"""Bootstrap intervals of means, for many cells measured on the same examples."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float

from fastlens.errors import FastlensError, ShapeError

METHODS = ("bca", "percentile")
# Numbers held at once: means of resamples, and how often each example is in them.
MEANS_HELD = 2**22
COUNTS_HELD = 2**21
# Of the largest value: means closer than this are equal but for rounding.
ROUNDING = 1e-12


def mean_interval(
    samples: Float[np.ndarray, "example cell"],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: str = "bca",
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Confidence interval of each cell's mean over examples, by resampling the examples.

    Every resample draws as many examples as there are, with replacement, the same ones for all
    cells. ``percentile`` takes quantiles of the resampled means; ``bca`` moves these quantiles for
    the bias and the skewness of the samples (Efron & Tibshirani 1993, chapters 13 and 14), which
    for a mean is exact and costs no more. A cell whose examples are all equal has an interval of
    no width; one with a NaN or infinite example has NaN.

    Args:
        level: Of confidence, between 0 and 1.
        seed: The same seed gives the same numbers.

    Returns: the lower and the upper ends, in the unit of the samples, float64.

    Cost: ``cells x resamples x examples`` multiply-adds and a sort, about 100 MB at a time however
    many cells there are.

    Raises: ShapeError for fewer than two examples. FastlensError for a level or method that does
        not exist, or too few resamples to reach into the tails.
    """
    n = samples.shape[0]
    if n < 2:
        raise ShapeError(f"an interval needs at least two examples; got {n}.")
    _check(level, resamples, method)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    ends = np.empty((samples.shape[1], 2))
    step = max(1, MEANS_HELD // resamples)
    for start in range(0, len(ends), step):
        part = slice(start, start + step)
        ends[part] = _ends(samples[:, part], tails, resamples, seed, method)
    return ends[:, 0], ends[:, 1]


def _check(level: float, resamples: int, method: str) -> None:
    if not 0 < level < 1:
        raise FastlensError(f"level={level} must lie between 0 and 1, such as 0.95.")
    if method not in METHODS:
        raise FastlensError(f"method={method!r} must be one of {METHODS}.")
    # Rounded first: 2 / (1 - 0.95) is a little more than 40.
    needed = int(np.ceil(round(2 / (1 - level), 6)))
    if resamples < needed:
        raise FastlensError(
            f"resamples={resamples} cannot show the tails of a {level:g} interval. "
            f"Use at least {needed}; 2000 are usual."
        )


def _ends(
    samples: np.ndarray, tails: np.ndarray, resamples: int, seed: int, method: str
) -> np.ndarray:
    x = samples.T.astype(np.float64)  # [cell, example]
    bad = ~np.isfinite(x).all(1)
    x[bad] = 0.0
    # Relative to the first example, so that equal examples give exactly their value.
    first = x[:, :1].copy()
    x -= first
    means = np.empty((len(x), resamples))
    for start, counts in _counts(x.shape[1], resamples, seed):
        np.matmul(x, counts.T, out=means[:, start : start + len(counts)])
    means /= x.shape[1]
    levels = np.broadcast_to(tails, (len(x), 2))
    if method == "bca":
        levels = _corrected(x, means, tails)
    means.sort(axis=1)
    ends = first + _quantiles(means, levels)
    ends[bad] = np.nan
    return ends


def _counts(n: int, resamples: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """How often each example is in each resample, some resamples at a time."""
    random = np.random.default_rng(seed)
    step = max(1, COUNTS_HELD // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        picks = random.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(picks.reshape(-1), minlength=size * n)
        yield start, counts.reshape(size, n).astype(np.float64)


def _corrected(x: np.ndarray, means: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """Levels of the quantiles, corrected for bias and skewness: ``[cell, 2]``."""
    mean = x.mean(1, keepdims=True)
    equal = ROUNDING * np.abs(x).max(1, keepdims=True)
    resamples = means.shape[1]
    # Means equal to the sample's count half: the share of resamples below it is then unbiased.
    below = (means < mean - equal).sum(1) + (means <= mean + equal).sum(1)
    share = np.clip(below / (2 * resamples), 0.5 / resamples, 1 - 0.5 / resamples)
    bias = _normal_quantile(share)[:, None]
    # Leaving example i out moves the mean by (mean - x_i) / (n - 1): no jackknife loop is needed.
    off = x - mean
    off /= np.maximum(np.abs(off).max(1, keepdims=True), np.finfo(np.float64).tiny)
    # At least 1 now, but for cells whose examples are all equal.
    squares = np.maximum((off**2).sum(1, keepdims=True), 1.0)
    skew = (off**3).sum(1, keepdims=True) / (6 * squares**1.5)
    moved = bias + _normal_quantile(tails)
    room = 1 - skew * moved
    beyond = np.copysign(np.inf, moved)
    corrected = np.where(room > 0, bias + moved / np.where(room > 0, room, 1.0), beyond)
    return torch.special.ndtr(torch.from_numpy(corrected)).numpy()


def _normal_quantile(share: np.ndarray) -> np.ndarray:
    return torch.special.ndtri(torch.from_numpy(share)).numpy()


def _quantiles(rows: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Quantiles of sorted rows, each row at its own levels, linear between neighbours."""
    place = levels * (rows.shape[1] - 1)
    lower = np.floor(place).astype(np.int64)
    upper = np.minimum(lower + 1, rows.shape[1] - 1)
    low, high = (np.take_along_axis(rows, at, axis=1) for at in (lower, upper))
    return low + (high - low) * (place - lower)
