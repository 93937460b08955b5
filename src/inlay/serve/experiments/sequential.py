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
CELLS = 256
"""Cells of [0, 1] whose means are tried."""
STAKES = 0.9 * 0.5 ** np.arange(10)
"""Parts of the wealth that gamblers stake: one of them is within a factor of 1.5 of the best for any difference."""
ROOM = 0.1
"""Where `mean_interval` is tightest: rho; 0.1 is some hundreds of values."""

Interval = tuple[float, float]


class Bets:
    """Wealth of gamblers who bet against each mean that values in [0, 1] could have.

    Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B 86(1): their hedged
    grid-Kelly capital. A gambler stakes the same part c of the wealth each time, so that a value x makes
    1 - c + c x / m of it against the mean m, or 1 - c + c (1 - x) / (1 - m) for those who say that the mean is smaller;
    the gamblers' average is as good as the best of them but for a factor of their number. Against the true mean it has
    the expectation 1 at any time, so by Ville's inequality it ever reaches 1/alpha with a probability of alpha at most.

    `values` are of independent units. `up` and `down`, each (stakes, cells) float64, are logarithms of the wealth at
    the right and the left edge of each cell.
    """

    def __init__(self, cells: int = CELLS) -> None:
        edges = np.linspace(0.0, 1.0, cells + 1)
        self.cells, self.left, self.right = cells, edges[:-1], edges[1:]
        self.up, self.down = np.zeros((len(STAKES), cells)), np.zeros((len(STAKES), cells))
        self.count, self.total = 0, 0.0

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def add(self, values: Sequence[float] | np.ndarray) -> None:
        for value, times in zip(*np.unique(np.asarray(values, np.float64), return_counts=True), strict=True):
            self.up += times * np.log1p(STAKES[:, None] * (value / self.right - 1))
            self.down += times * np.log1p(STAKES[:, None] * ((1 - value) / (1 - self.left) - 1))
        self.count, self.total = self.count + len(values), self.total + float(np.sum(values))

    def joined(self, other: Bets) -> Bets:
        """The wealth of those who saw the values of both."""
        made = Bets(self.cells)
        made.up, made.down = self.up + other.up, self.down + other.down
        made.count, made.total = self.count + other.count, self.total + other.total
        return made

    def least(self) -> np.ndarray:
        """A lower bound of the wealth's logarithm against any mean in each cell: (cells,). `up` falls with the mean
        and `down` grows, so a cell's bound is that of its two edges, and no mean between them is overlooked."""
        both = np.concatenate([self.up, self.down])
        most = both.max(0)
        return most + np.log(np.exp(both - most).mean(0))

    def interval(self, level: float = LEVEL) -> Interval:
        """The means that are not excluded."""
        left = np.flatnonzero(self.least() < -math.log(1 - level))
        if not len(left):  # no one mean fits the values
            return 0.0, 1.0
        return self.left[left[0]].item(), self.right[left[-1]].item()


def difference(pairs: Sequence[tuple[Bets, Bets]], level: float = LEVEL) -> tuple[Interval, float]:
    """What the mean of the second may be above that of the first, and p of their equality; both hold at any time.

    `pairs` are of phases between which weights moved: what drifts from phase to phase is the same for both arms of
    one, and no difference. Against a pair of means the product of both wealths is a bet too, whichever arm the next
    value comes from; against a difference it is worth the least that any pair of means so far apart leaves, and phases
    multiply.
    """
    if not pairs:
        return (-1.0, 1.0), 1.0
    limit, cells = -math.log(1 - level), pairs[0][0].cells
    apart = np.zeros(2 * cells)  # for differences of -1 .. 1 in steps of a cell: those of each step
    equal = 0.0
    for first, second in pairs:
        padded = np.pad(second.least(), cells - 1, constant_values=np.inf)
        # (2 cells - 1, cells): row d has the second's cells d - (cells - 1) to the right of the first's
        worth = (np.lib.stride_tricks.sliding_window_view(padded, cells) + first.least()).min(1)
        apart += np.minimum(np.append(np.inf, worth), np.append(worth, np.inf))
        equal += float(worth[cells - 1])
    left = np.flatnonzero(apart < limit)
    if not len(left):  # no means fit the values of any phase
        return (-1.0, 1.0), 1.0
    return (left[0].item() / cells - 1, (left[-1].item() + 1) / cells - 1), min(1.0, math.exp(-max(0.0, equal)))


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
