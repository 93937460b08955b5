"""What each row scored where a head answers with numbers or tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .rows import Floats, RowScores, Statistic

__all__ = ["NumberScores", "TagScores", "spans_of"]


@dataclass(frozen=True)
class NumberScores(RowScores):
    """Rows with the number that is right, `true` (n,), and the one that was `said`; their losses are squared errors."""

    true: Floats = field(default_factory=lambda: np.zeros(0))
    said: Floats = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of_numbers(cls, samples: Sequence[int], true: Sequence[float], said: Sequence[float]) -> NumberScores:
        right, found = np.array(true, np.float64), np.array(said, np.float64)
        numbers, ones = np.array(samples, np.int64), np.ones(len(right), np.int64)
        return cls(numbers, (found - right) ** 2, ones, np.zeros(len(right), np.int64), true=right, said=found)

    def scores(self) -> dict[str, float]:
        return {"loss": float(self.nats.mean())} | {name: own.value for name, own in self.statistics().items()}

    def statistics(self) -> Mapping[str, Statistic]:
        """Mean absolute error, and the correlations of Pearson and Spearman (of ranks, drawn anew with the rows)."""
        error = np.stack([np.abs(self.said - self.true), np.ones(len(self))], 1)
        return {
            "mae": Statistic(error, lambda sums: sums[:, 0] / sums[:, 1], (0.0, np.inf)),
            "pearson": Statistic(_moments(self.true, self.said), _correlation, (-1.0, 1.0)),
            "spearman": Statistic(_moments(_ranks(self.true), _ranks(self.said)), _correlation, (-1.0, 1.0)),
        }


@dataclass(frozen=True)
class TagScores(RowScores):
    """Rows of tagged words: losses and hits of their tags, and `spans` (n, 3): found rightly, there, and found."""

    spans: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), np.int64))

    @classmethod
    def of_tags(
        cls, samples: Sequence[int], nats: Sequence[float], true: Sequence[Sequence[str]], said: Sequence[Sequence[str]]
    ) -> TagScores:
        hits = [sum(a == b for a, b in zip(own, other, strict=True)) for own, other in zip(true, said, strict=True)]
        spans = [_span_counts(own, other) for own, other in zip(true, said, strict=True)]
        ints = (np.array(values, np.int64) for values in (samples, [len(own) for own in true], hits))
        numbers, tokens, right = ints
        return cls(
            numbers, np.array(nats, np.float64), tokens, right, spans=np.array(spans, np.int64).reshape(len(numbers), 3)
        )

    def scores(self) -> dict[str, float]:
        tokens = self.tokens.sum()
        whole = {"loss": float(self.nats.sum() / tokens), "accuracy": float(self.hits.sum() / tokens)}
        return whole | {name: own.value for name, own in self.statistics().items()}

    def statistics(self) -> Mapping[str, Statistic]:
        """F1 of whole spans over all rows, as CoNLL counts them; 1 where there are none and none is found."""
        return {"span_f1": Statistic(self.spans.astype(np.float64), _span_f1, (0.0, 1.0))}


def spans_of(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(start, end, kind) of the spans in a row's tags: B-X begins one, I-X goes on with it (or begins one, where no X
    stands before it), E-X and S-X as in BIOES. Other tags than O are spans of their own as long as they repeat.
    """
    found, start, kind = set(), 0, ""
    for n, tag in enumerate([*tags, "O"]):
        mark, dash, name = tag.partition("-")
        schemed = bool(dash) and mark in ("B", "I", "E", "S", "L", "U")
        own = name if schemed else ("" if tag == "O" else tag)
        begins = own != kind or (schemed and mark in ("B", "S", "U"))
        if begins:
            if kind:
                found.add((start, n, kind))
            start, kind = n, own
        if schemed and mark in ("E", "S", "L", "U"):
            found.add((start, n + 1, kind))
            kind = ""
    return found


def _span_counts(true: Sequence[str], said: Sequence[str]) -> tuple[int, int, int]:
    there, found = spans_of(true), spans_of(said)
    return len(there & found), len(there), len(found)


def _span_f1(sums: Floats) -> Floats:
    both = sums[:, 1] + sums[:, 2]
    return np.where(both > 0, 2 * sums[:, 0] / np.maximum(both, 1), 1.0)


def _moments(x: Floats, y: Floats) -> Floats:
    x, y = x - x.mean(), y - y.mean()  # so that sums of squares keep their digits
    return np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], 1)


def _correlation(sums: Floats) -> Floats:
    """Pearson's r (k,) from sums of 1, x, y, xx, yy, xy; 0 where x or y never changes."""
    n, x, y, xx, yy, xy = sums.T
    spread = np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0)
    scale = np.maximum(xx * yy, 1e-300)
    there = spread > 1e-24 * scale
    return np.where(there, (xy - x * y / n) / np.sqrt(np.where(there, spread, 1.0)), 0.0).clip(-1, 1)


def _ranks(values: Floats) -> Floats:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return ((ends - counts + 1 + ends) / 2)[inverse.reshape(-1)]
