"""95 % intervals of scores: how far off they may be for the rows that happened to be drawn.

Shares of rows have Wilson's interval (1927). The rest is bootstrapped over rows with a fixed seed, at the percentiles
that make up for the narrowness of few rows (Hesterberg 2015, arXiv:1411.5279, §5.4); below FEW rows Student's t takes
its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .rows import Floats, RowScores, Statistic, macro_f1, perplexity

__all__ = ["FEW", "Interval", "intervals", "mean_interval", "resampled", "statistic_interval", "student", "wilson"]

Interval = tuple[float, float]

FEW = 10
"""Rows below which no verdict is given, and below which a bootstrap has too little to draw from."""
RESAMPLES = 4000
BLOCKS = 2000
"""Rows beyond these are drawn in so many blocks of rows: the same spread, in bounded time."""
CELLS = 2_000_000
"""Numbers that are drawn at once."""
TAIL = 0.025


def intervals(rows: RowScores) -> dict[str, Interval | None]:
    """An interval for each metric of `rows`; None where a single row, or a loss that is no number, allows none."""
    loss = mean_interval(rows.nats, rows.tokens)
    loss = None if loss is None else (max(0.0, loss[0]), loss[1])
    if rows.right is not None:
        return {"loss": loss, "accuracy": wilson(int(rows.hits.sum()), len(rows)), "f1": _f1_interval(rows)}
    exact = wilson(int(rows.exact.sum()), len(rows))
    if own := rows.statistics():
        accuracy = {"accuracy": _within(mean_interval(rows.hits, rows.tokens), exact)} if rows.hits.any() else {}
        return {"loss": loss} | accuracy | {name: statistic_interval([one], len(rows)) for name, one in own.items()}
    found = {"loss": loss, "perplexity": None if loss is None else (perplexity(loss[0]), perplexity(loss[1]))}
    return {**found, "accuracy": _within(mean_interval(rows.hits, rows.tokens), exact), "exact_match": exact}


def wilson(hits: int, rows: int) -> Interval:
    """The interval of a share of rows; (0, 1) where there are none."""
    if not rows:
        return 0.0, 1.0
    z2, share = NormalDist().inv_cdf(1 - TAIL) ** 2, hits / rows
    middle, scale = share + z2 / (2 * rows), 1 + z2 / rows
    half = math.sqrt(z2 * (share * (1 - share) / rows + z2 / (4 * rows * rows)))
    low, high = (middle - half) / scale, (middle + half) / scale
    return 0.0 if hits == 0 else low, 1.0 if hits == rows else high


def mean_interval(values: NDArray, weights: NDArray) -> Interval | None:
    """The interval of sum(values) / sum(weights) over rows, both (n,): a mean a token where weights are tokens."""
    whole = float(weights.sum())
    if len(values) < 2 or not whole or not np.isfinite(values).all():
        return None
    mean = float(values.sum() / whole)
    if len(values) < FEW:
        # As in a jackknife: what the mean is moved by without the row, which is more for rows of much weight.
        influence = (len(values) - 1) * (values - mean * weights) / np.maximum(whole - weights, 1e-9)
        alike = whole**2 / float((weights.astype(np.float64) ** 2).sum())  # so many rows of one weight (Kish 1965)
        return student_interval(mean, influence, max(1, round(alike) - 1))
    return spread(resampled(np.stack([values, weights], 1)), lambda sums: sums[:, 0] / sums[:, 1], len(values))


def statistic_interval(statistics: Sequence[Statistic], rows: int) -> Interval | None:
    """The interval of a statistic of so many rows, or of the first of two less the second; None for few rows, which a
    bootstrap cannot draw from."""
    columns = np.concatenate([one.columns for one in statistics], 1)
    if rows < FEW or not np.isfinite(columns).all():
        return None
    edges = np.cumsum([0, *(one.columns.shape[1] for one in statistics)])

    def apart(sums: Floats) -> Floats:
        first, *others = (one.of(sums[:, a:b]) for one, a, b in zip(statistics, edges, edges[1:], strict=False))
        return first - others[0] if others else first

    low, high = spread(resampled(columns), apart, rows)
    least, most = statistics[0].within if len(statistics) == 1 else (-math.inf, math.inf)
    return max(low, least), min(high, most)


def student_interval(estimate: float, influence: Floats, freedom: int | None = None) -> Interval:
    """The interval of an estimate that is a mean of what each row (n,) moves it by; n - 1 degrees of `freedom`."""
    n = len(influence)
    half = student(freedom or n - 1) * math.sqrt(float((influence**2).sum()) / (n - 1) / n)
    return estimate - half, estimate + half


def spread(sums: Floats, statistic: Callable[[Floats], Floats], rows: int) -> Interval:
    """The interval of a statistic of resampled sums (k, columns), for as many `rows`."""
    low, high = np.quantile(statistic(sums), (tail(rows), 1 - tail(rows)))
    return float(low), float(high)


def resampled(columns: NDArray) -> Floats:
    """Sums (RESAMPLES, columns) over n rows drawn with replacement from `columns` (n, columns)."""
    rng = np.random.default_rng(0)
    columns = columns.astype(np.float64)
    if len(columns) > BLOCKS:
        order = rng.permutation(len(columns))
        edges = np.linspace(0, len(columns), BLOCKS + 1).astype(np.int64)[:-1]
        columns = np.add.reduceat(columns[order], edges)
    many = len(columns)
    step = max(1, CELLS // (many * columns.shape[1]))
    drawn = [
        columns[rng.integers(many, size=(min(step, RESAMPLES - start), many))].sum(1)
        for start in range(0, RESAMPLES, step)
    ]
    return np.concatenate(drawn)


def f1_samples(right: NDArray, predictions: list[NDArray], labels: int) -> list[Floats]:
    """Macro F1 (RESAMPLES,) of each of some `predictions` (n,) on the same resampled rows."""
    cells, counts = np.unique(np.stack([right, *predictions]), axis=1, return_counts=True)
    rng, hot = np.random.default_rng(0), np.eye(labels)
    found: list[list[Floats]] = [[] for _ in predictions]
    step = max(1, CELLS // (len(counts) + labels))
    for start in range(0, RESAMPLES, step):
        drawn = rng.multinomial(len(right), counts / counts.sum(), size=min(step, RESAMPLES - start)).astype(np.float64)
        true = drawn @ hot[cells[0]]
        for own, predicted in zip(found, cells[1:], strict=True):
            hits = (drawn * (predicted == cells[0])) @ hot[cells[0]]
            own.append(macro_f1(hits, true, drawn @ hot[predicted]))
    return [np.concatenate(own) for own in found]


def _f1_interval(rows: RowScores) -> Interval | None:
    assert rows.right is not None and rows.predicted is not None
    if len(rows) < 2:
        return None
    samples = f1_samples(rows.right, [rows.predicted], len(rows.labels))[0]
    found = spread(samples[:, None], lambda sums: sums[:, 0], len(rows))
    return _within(found, wilson(int(rows.hits.sum()), len(rows)))


def _within(found: Interval | None, shares: Interval) -> Interval | None:
    """A share's bootstrap knows nothing of faults that it never saw: where it stands still, rows' `shares` widen it."""
    if found is None or found[1] > found[0]:
        return None if found is None else (max(0.0, found[0]), min(1.0, found[1]))
    return min(found[0], shares[0]), max(found[1], shares[1])


# ---- quantiles


def tail(rows: int) -> float:
    """The share of resamples beyond each end of an interval of n rows."""
    return NormalDist().cdf(-math.sqrt(rows / (rows - 1)) * student(rows - 1))


@lru_cache
def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    if freedom > 1000:
        z = NormalDist().inv_cdf(1 - TAIL)
        return z + (z**3 + z) / (4 * freedom)
    low, high = 0.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < 1 - TAIL else (low, middle)
    return high


def _student_cdf(t: float, freedom: int) -> float:
    """For t > 0, by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for n in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (n - 1) / n
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + inside / 2
