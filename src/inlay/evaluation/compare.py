"""Whether one adapter is better than another, or than the base, on the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from inlay.errors import UsageError

from .intervals import (
    FEW,
    Interval,
    f1_samples,
    mean_interval,
    resampled,
    spread,
    statistic_interval,
    student_interval,
)
from .rows import Floats, RowScores, perplexity

__all__ = ["HIGHER", "Comparison", "compare"]

HIGHER = ("accuracy", "f1", "exact_match", "span_f1", "pearson", "spearman")
"""Metrics of which more is better; of the others, less is."""
SIGNS = 50
"""Rows that differ, below which the sign test has a say: a bootstrap thinks too well of four rows out of four."""


@dataclass(frozen=True)
class Comparison:
    """By how much one's `metric` stands above the other's on `rows` rows, and the 95 % interval of that.

    `better` is True or False where the interval leaves zero out, and None where it does not or rows are too few.
    """

    metric: str
    difference: float
    interval: Interval | None
    rows: int
    better: bool | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        interval = None if self.interval is None else list(self.interval)
        values = {"metric": self.metric, "difference": self.difference, "interval": interval}
        return {**values, "rows": self.rows, "better": self.better}


def compare(a: RowScores, b: RowScores, metric: str) -> Comparison:
    """`a` less `b`, paired over rows. Raises: UsageError where they are not of the same rows."""
    if not np.array_equal(a.samples, b.samples):
        raise UsageError("the scores are of different rows", "Score both on the same ones.")
    difference = a.scores()[metric] - b.scores()[metric]
    interval = _interval(a, b, metric, difference)
    better = None
    if interval is not None and len(a) >= FEW and (interval[0] > 0 or interval[1] < 0):
        better = (interval[0] > 0) == (metric in HIGHER)
    return Comparison(metric, difference, interval, len(a), better)


def _interval(a: RowScores, b: RowScores, metric: str, difference: float) -> Interval | None:
    ours, theirs = a.statistics(), b.statistics()
    if metric in ours:
        return statistic_interval([ours[metric], theirs[metric]], len(a))
    if metric == "perplexity":
        return _perplexities(a, b, difference)
    if metric == "f1":
        assert a.right is not None and a.predicted is not None and b.predicted is not None
        if len(a) < 2:
            return None
        own, other = f1_samples(a.right, [a.predicted, b.predicted], len(a.labels))
        found = spread((own - other)[:, None], lambda sums: sums[:, 0], len(a))
        return _signed(found, a.hits - b.hits)
    if metric == "exact_match":
        change = a.exact.astype(np.int64) - b.exact.astype(np.int64)
        return _signed(mean_interval(change, np.ones(len(a))), change)
    if metric == "accuracy":
        return _signed(mean_interval(a.hits - b.hits, a.tokens), np.sign(a.hits - b.hits))
    return mean_interval(a.nats - b.nats, a.tokens)


def _perplexities(a: RowScores, b: RowScores, difference: float) -> Interval | None:
    if len(a) < 2 or not (np.isfinite(a.nats).all() and np.isfinite(b.nats).all()):
        return None
    if len(a) < FEW:
        moved = [perplexity(own) * (x.nats - own * x.tokens) for x in (a, b) for own in [x.nats.sum() / x.tokens.sum()]]
        return student_interval(difference, len(a) * (moved[0] - moved[1]) / a.tokens.sum())

    def apart(sums: Floats) -> Floats:
        ours, theirs = (np.exp(np.minimum(sums[:, n] / sums[:, 2], 700)) for n in (0, 1))
        return ours - theirs

    return spread(resampled(np.stack([a.nats, b.nats, a.tokens], 1)), apart, len(a))


def _signed(found: Interval | None, signs: np.ndarray) -> Interval | None:
    """`found`, with zero inside where the rows that differ (`signs` not 0) may differ so by chance (sign test, 5 %)."""
    up, down = int((signs > 0).sum()), int((signs < 0).sum())
    if found is None or up + down > SIGNS:
        return found
    chance = 2 * sum(math.comb(up + down, n) for n in range(min(up, down) + 1)) / 2 ** (up + down)
    return (min(found[0], 0.0), max(found[1], 0.0)) if chance > 0.05 else found
