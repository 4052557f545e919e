"""Cluster bootstrap: confidence intervals for scores whose samples come in clusters.

Four images of one prompt, or six questions about one image, are not independent: whole clusters are resampled (Efron &
Tibshirani 1993, chapter 8), else the interval is too narrow. With strata, such as GenEval's tags, clusters are drawn
within each stratum, and the score is the mean of the strata's means. Intervals are percentiles of 2000 resamples with
a fixed seed.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES, LEVEL, SEED = 2000, 0.95, 0
WEIGHTS_AT_ONCE = 2**22  # float64: 32 MB

Weights = np.ndarray
"""[R, n]: how often each of n samples occurs in each of R resamples."""
Statistic = Callable[[Weights], np.ndarray]
"""Weights [R, n] -> the score of each resample [R]."""


class Interval(NamedTuple):
    """A score with its confidence interval; `low` and `high` are None if a stratum has fewer than two clusters."""

    value: float
    low: float | None
    high: float | None
    clusters: int


class Difference(NamedTuple):
    """The difference of run B minus run A on the same samples; `p` is the two-sided bootstrap p-value of no difference,
    None if there is no interval."""

    value: float
    low: float | None
    high: float | None
    clusters: int
    p: float | None


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = SEED,
) -> Interval:
    """Return the mean of `values`, or with `strata` the mean of the strata's means, with its interval.

    Args:
        values, clusters, strata: one entry per sample.
    """
    statistic = _stratified_mean(np.asarray(values, dtype=np.float64), strata)
    return bootstrap(statistic, clusters, strata, resamples=resamples, level=level, seed=seed)


def paired_bootstrap(
    values_a: Sequence[float] | np.ndarray,
    values_b: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = SEED,
) -> Difference:
    """Return B minus A over the same samples: every resample draws the same clusters for both runs."""
    a, b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"two runs are compared sample by sample, not {a.shape} and {b.shape} values")
    statistic = _stratified_mean(b - a, strata)
    value, drawn, count = _resampled(statistic, clusters, strata, resamples, seed)
    if drawn is None:
        return Difference(value, None, None, count, None)
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (resamples + 1))  # never 0: 2000 resamples cannot tell
    return Difference(value, *_percentiles(drawn, level), count, p)


def bootstrap(
    statistic: Statistic,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = SEED,
) -> Interval:
    """Return the interval of any score that is a function of sample weights (how often each counts), such as F1."""
    value, drawn, count = _resampled(statistic, clusters, strata, resamples, seed)
    if drawn is None:
        return Interval(value, None, None, count)
    return Interval(value, *_percentiles(drawn, level), count)


def _resampled(
    statistic: Statistic, clusters: Sequence[Hashable], strata: Sequence[Hashable] | None, resamples: int, seed: int
) -> tuple[float, np.ndarray | None, int]:
    """Return the score, the scores of the resamples [R] (None if a stratum is too small), the number of clusters."""
    if not len(clusters):
        raise ValueError("there is nothing to resample: no samples")
    value = float(statistic(np.ones((1, len(clusters))))[0])
    index, groups = _numbered_clusters(clusters, strata)
    count = sum(map(len, groups))
    if min(map(len, groups)) < 2:
        return value, None, count
    drawn = np.concatenate([statistic(weights) for weights in _draws(index, groups, resamples, seed)])
    return value, drawn, count


def _numbered_clusters(
    clusters: Sequence[Hashable], strata: Sequence[Hashable] | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the index of each sample's cluster [n], and for each stratum the indices of its clusters."""
    strata = [None] * len(clusters) if strata is None else strata
    numbers: dict[Hashable, int] = {}
    homes: dict[int, Hashable] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    for number, stratum in zip(index.tolist(), strata, strict=True):
        if homes.setdefault(number, stratum) != stratum:
            name = next(cluster for cluster, found in numbers.items() if found == number)
            raise ValueError(f"the cluster {name!r} lies in two strata, {homes[number]!r} and {stratum!r}")
    members: dict[Hashable, list[int]] = {}
    for number, stratum in homes.items():
        members.setdefault(stratum, []).append(number)
    return index, [np.array(group) for group in members.values()]


def _draws(index: np.ndarray, groups: list[np.ndarray], resamples: int, seed: int) -> Iterator[Weights]:
    """Yield weights [r, n], in pieces that bound memory use."""
    rng = np.random.default_rng(seed)
    total = sum(map(len, groups))
    piece = max(1, min(resamples, WEIGHTS_AT_ONCE // len(index)))
    for start in range(0, resamples, piece):
        rows = min(piece, resamples - start)
        counts = np.zeros((rows, total))
        for group in groups:
            size = len(group)
            # offset each row by its own range, so that one bincount counts all rows
            chosen = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
            counts[:, group] = np.bincount(chosen.ravel(), minlength=rows * size).reshape(rows, size)
        yield counts[:, index]


def _stratified_mean(values: np.ndarray, strata: Sequence[Any] | None) -> Statistic:
    """Return the statistic that averages `values` [n] within each stratum, then over strata."""
    names = [None] * len(values) if strata is None else list(strata)
    if len(names) != len(values):
        raise ValueError(f"{len(values)} values come with {len(names)} strata")
    members = [np.flatnonzero([found == name for found in names]) for name in dict.fromkeys(names)]

    def statistic(weights: Weights) -> np.ndarray:
        # Plain sums, not a matrix product, whose last bit depends on the number of threads.
        sums = [(weights[:, member] * values[member]).sum(axis=1) for member in members]
        counts = [weights[:, member].sum(axis=1) for member in members]
        mean: np.ndarray = np.mean([total / count for total, count in zip(sums, counts, strict=True)], axis=0)
        return mean

    return statistic


def _percentiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
