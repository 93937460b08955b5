"""Counts of what was right, and the metrics they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .score import Result

__all__ = ["Confusion", "Tally"]


@dataclass
class Confusion:
    """`table[i][j]` rows of label i were taken for label j."""

    labels: list[str]
    table: list[list[int]]

    def macro_f1(self) -> float:
        """The mean over labels, those without a row left out, of the harmonic mean of precision and recall."""
        found = []
        for n in range(len(self.labels)):
            right, true, said = self.table[n][n], sum(self.table[n]), sum(row[n] for row in self.table)
            if true:
                found.append(2 * right / (true + said))
        return sum(found) / len(found) if found else 0.0


@dataclass
class Tally:
    """Adds up results; `labels` are those of the verbalizer."""

    labels: Sequence[str]
    rows: int = 0
    tokens: int = 0
    hits: int = 0
    exact: int = 0
    nats: float = 0.0
    confusion: Confusion = field(init=False)

    def __post_init__(self) -> None:
        self.confusion = Confusion(list(self.labels), [[0] * len(self.labels) for _ in self.labels])

    def add(self, results: Sequence[Result]) -> None:
        for result in results:
            self.rows += 1
            if result.log_probabilities:
                best = max(result.log_probabilities, key=lambda label: result.log_probabilities[label])
                self.confusion.table[self.labels.index(result.label)][self.labels.index(best)] += 1
                self.nats -= result.log_probabilities[result.label]
                self.hits += best == result.label
            else:
                self.tokens += result.tokens
                self.nats += result.nats
                self.hits += result.hits
                self.exact += result.hits == result.tokens

    def scores(self, labelled: bool) -> dict[str, float]:
        if labelled:
            loss, accuracy = self.nats / self.rows, self.hits / self.rows
            return {"loss": loss, "accuracy": accuracy, "f1": self.confusion.macro_f1()}
        loss = self.nats / max(self.tokens, 1)
        scores = {"loss": loss, "perplexity": math.exp(min(loss, 700)) if loss == loss else math.nan}
        return {**scores, "accuracy": self.hits / max(self.tokens, 1), "exact_match": self.exact / self.rows}
