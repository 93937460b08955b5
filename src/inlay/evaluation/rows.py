"""What each row scored, from which every metric, interval and comparison is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Confusion", "RowScores", "Statistic", "macro_f1"]

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Statistic:
    """A metric that follows from sums over rows: `of` maps sums (k, m) of `columns` (rows, m) to k values, which are
    `within` bounds."""

    columns: Floats
    of: Callable[[Floats], Floats]
    within: tuple[float, float]

    @property
    def value(self) -> float:
        return float(self.of(self.columns.sum(0)[None])[0])


@dataclass
class Confusion:
    """`table[i][j]` rows of label i were taken for label j."""

    labels: list[str]
    table: list[list[int]]

    def macro_f1(self) -> float:
        """The mean over labels, those without a row left out, of the harmonic mean of precision and recall."""
        table = np.array(self.table, np.int64).reshape(len(self.labels), len(self.labels))
        return float(macro_f1(table.diagonal()[None], table.sum(1)[None], table.sum(0)[None])[0])


def macro_f1(right: NDArray, true: NDArray, predicted: NDArray) -> Floats:
    """Macro F1 (k,) of k tables by each label's counts (k, labels): taken rightly, there, and taken for it."""
    there = true > 0
    each = np.where(there, 2 * right / np.maximum(true + predicted, 1), 0.0)
    return each.sum(-1) / np.maximum(there.sum(-1), 1)


@dataclass(frozen=True)
class RowScores:
    """Of n rows: their numbers in the table (`samples`), their losses in `nats` (float64), the `tokens` of their loss
    masks, and how many of those were `hits` (int64).

    Labelled rows have one token each, the label; `right` and `predicted` (n,) are the numbers of the right label and of
    the predicted one among `labels`, `probabilities` (n, labels) those of all.
    """

    samples: Counts
    nats: Floats
    tokens: Counts
    hits: Counts
    labels: tuple[str, ...] = ()
    right: Counts | None = None
    predicted: Counts | None = None
    probabilities: Floats | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @classmethod
    def of_labels(
        cls, samples: Sequence[int], right: Sequence[int], log_probabilities: Floats, labels: Sequence[str]
    ) -> RowScores:
        """From the labels' log-probabilities (n, labels), the first of equal ones being the chosen one."""
        true, predicted = np.array(right, np.int64), log_probabilities.argmax(1)
        nats = -log_probabilities[np.arange(len(true)), true]
        ones, hits = np.ones(len(true), np.int64), (predicted == true).astype(np.int64)
        numbers = np.array(samples, np.int64)
        return cls(numbers, nats, ones, hits, tuple(labels), true, predicted, np.exp(log_probabilities))

    @classmethod
    def of_tokens(
        cls, samples: Sequence[int], nats: Sequence[float], tokens: Sequence[int], hits: Sequence[int]
    ) -> RowScores:
        """From sums over learned tokens; the pieces of one row count as one."""
        numbers, first, piece = np.unique(np.array(samples, np.int64), return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))  # rows stay in the order they came in
        place, many = order[piece.reshape(-1)], len(numbers)

        def summed(values: Sequence[float] | Sequence[int]) -> Floats:
            return np.bincount(place, np.array(values, np.float64), many).astype(np.float64)

        whole, right = (summed(values).astype(np.int64) for values in (tokens, hits))
        return cls(numbers[np.argsort(first)], summed(nats), whole, right)

    @property
    def exact(self) -> NDArray[np.bool_]:
        """Rows (n,) whose every learned token was the likeliest."""
        return self.hits == self.tokens

    @property
    def confusion(self) -> Confusion | None:
        if self.right is None or self.predicted is None:
            return None
        many = len(self.labels)
        table = np.bincount(self.right * many + self.predicted, minlength=many * many).reshape(many, many)
        return Confusion(list(self.labels), table.tolist())

    def statistics(self) -> Mapping[str, Statistic]:
        """Metrics of a kind of rows' own, by name."""
        return {}

    def scores(self) -> dict[str, float]:
        """Every metric of the rows; see `inlay.evaluation.score.score_rows`."""
        loss, accuracy = float(self.nats.sum() / self.tokens.sum()), float(self.hits.sum() / self.tokens.sum())
        if (confusion := self.confusion) is not None:
            return {"loss": loss, "accuracy": accuracy, "f1": confusion.macro_f1()}
        scores = {"loss": loss, "perplexity": perplexity(loss), "accuracy": accuracy}
        return {**scores, "exact_match": float(self.exact.mean())}


def perplexity(loss: float) -> float:
    """exp(loss), which stays a number where the loss is very high."""
    return math.exp(min(loss, 700)) if loss == loss else math.nan
