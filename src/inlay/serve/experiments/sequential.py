"""Intervals and tests that hold at every time at once: whoever looks after each answer is wrong no more often.

A usual 95 % interval is right in 95 % of looks; who looks until it excludes a difference will see one where none is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["LEVEL", "Bets", "Interval", "difference", "mean_interval", "share_interval"]

LEVEL = 0.95
"""Of every interval: it misses at any time at all with a probability of 1 - LEVEL at most."""
CELLS = 512
"""Cells of [0, 1] whose means are tried."""
TRUNCATION = 0.5
"""A bet never stakes more than this part of the capital."""
CHUNK = 1024
ROOM = 0.1
"""Where `mean_interval` is tightest: rho; 0.1 is some hundreds of values."""

Interval = tuple[float, float]


class Bets:
    """Wealth of gamblers who bet against each mean that values in [0, 1] could have.

    Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B 86(1): the hedged
    capital of their Theorem 3 with the stakes of its equation (26). `values` are of independent units, in the order in
    which they came. The wealth against the true mean has the expectation 1 at any time, so by Ville's inequality it
    ever reaches 1/alpha with a probability of alpha at most.

    `up` and `down`, each (cells + 1,) float64, are logarithms of the wealth of those who say that the mean is larger or
    smaller than each edge of the cells.
    """

    def __init__(self, cells: int = CELLS) -> None:
        self.edges = np.linspace(0.0, 1.0, cells + 1)
        self.up, self.down = np.zeros(cells + 1), np.zeros(cells + 1)
        self.count, self.total, self._spread = 0, 0.0, 0.25

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def add(self, values: Sequence[float]) -> None:
        for start in range(0, len(values), CHUNK):
            self._add(np.asarray(values[start : start + CHUNK], dtype=np.float64))

    def _add(self, x: np.ndarray) -> None:
        count = self.count + np.arange(1, len(x) + 1)
        means = (0.5 + self.total + np.cumsum(x)) / (count + 1)
        spread = self._spread + np.cumsum((x - means) ** 2)
        before = np.concatenate(([self._spread], spread[:-1])) / count  # variances known when each bet is made
        stake = np.sqrt(2 * math.log(2 / (1 - LEVEL)) / (before * count * np.log(count + 1)))[:, None]  # (n, 1)
        away = x[:, None] - self.edges  # (n, cells + 1)
        with np.errstate(divide="ignore"):
            self.up += np.log1p(np.minimum(stake, TRUNCATION / self.edges) * away).sum(0)
            self.down += np.log1p(-np.minimum(stake, TRUNCATION / (1 - self.edges)) * away).sum(0)
        self.count, self.total, self._spread = int(count[-1]), self.total + float(x.sum()), float(spread[-1])

    def least(self) -> np.ndarray:
        """A lower bound of the wealth's logarithm against any mean in each cell: (cells,). `up` falls with the mean
        and `down` grows, so a cell's bound is that of its two edges, and no mean between them is overlooked."""
        return np.logaddexp(self.up[1:], self.down[:-1]) - math.log(2)

    def interval(self, level: float = LEVEL) -> Interval:
        """The means that are not excluded."""
        left = np.flatnonzero(self.least() < -math.log(1 - level))
        if not len(left):  # the values drift: no one mean fits them
            return self.edges[0].item(), self.edges[-1].item()
        return self.edges[left[0]].item(), self.edges[left[-1] + 1].item()


def difference(first: Bets, second: Bets, level: float = LEVEL) -> tuple[Interval, float]:
    """What the mean of `second` may be above that of `first`, and p of their equality; both hold at any time.

    Against a pair of means the product of both wealths is a bet too, whichever arm the next value comes from. Equality
    is refused when every pair of equal means is, and some pair of others is left.
    """
    one, two = first.least(), second.least()
    limit, cells = -math.log(1 - level), len(one)
    p = min(1.0, math.exp(-max(0.0, float((one + two).min()))))
    # for each mean of the first, the lowest and highest cell of the second that is left beside it
    left = one[:, None] + two < limit  # (cells, cells)
    some = np.flatnonzero(left.any(1))
    if not len(some):
        return (-1.0, 1.0), 1.0
    low = (left[some].argmax(1) - some - 1).min()
    high = (cells - left[some, ::-1].argmax(1) - some).max()
    return (max(-1.0, float(low) / cells), min(1.0, float(high) / cells)), p


def share_interval(hits: int, count: int, level: float = LEVEL) -> Interval:
    """Where a probability lies of which `hits` of `count` trials were seen, at any time.

    A uniform mixture of likelihood ratios (Robbins 1970, "Statistical methods related to the law of the iterated
    logarithm"): B(1 + hits, 1 + misses) / (p^hits (1-p)^misses) is below 1/(1 - level) for the p that are left.
    """
    limit, misses = -math.log(1 - level), count - hits
    mixed = math.lgamma(1 + hits) + math.lgamma(1 + misses) - math.lgamma(2 + count)

    def excluded(p: float) -> bool:
        return mixed - (hits * math.log(p) if hits else 0) - (misses * math.log1p(-p) if misses else 0) >= limit

    middle = hits / count if count else 0.5
    return _edge(excluded, 0.0, middle) if hits else 0.0, _edge(excluded, 1.0, middle) if misses else 1.0


def _edge(excluded: object, out: float, inside: float) -> float:
    """The last value towards `out` that is not excluded, by bisection."""
    for _ in range(60):
        middle = (out + inside) / 2
        out, inside = (middle, inside) if excluded(middle) else (out, middle)  # pyright: ignore
    return out


def mean_interval(count: int, total: float, squares: float, level: float = LEVEL) -> Interval | None:
    """Where the mean of `count` values lies, of which the sum and the sum of squares are known: times in seconds have
    no bound. It holds at any time once there are many values (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2024,
    "Time-uniform central limit theory and asymptotic confidence sequences", Annals of Statistics 52(6)). None below 2.
    """
    if count < 2:
        return None
    mean = total / count
    deviation = math.sqrt(max(0.0, squares / count - mean**2))
    grown = count * ROOM**2 + 1
    half = deviation * math.sqrt(2 * grown / (count * ROOM) ** 2 * math.log(math.sqrt(grown) / (1 - level)))
    return mean - half, mean + half
