"""The best checkpoint of a learner, early stopping, and overfitting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inlay.evaluation.compare import HIGHER
from inlay.evaluation.intervals import FEW, mean_interval
from inlay.evaluation.score import Scored

__all__ = ["BestCheckpoint"]

KEPT = ("scores", "best_step", "weights", "overfits", "lowest", "latest", "rows")
"""What a checkpoint file holds of it."""
RISE = 0.02
"""By which share held-out loss stands above its lowest when an adapter is said to overfit."""


@dataclass
class BestCheckpoint:
    """Held-out scores of one learner over its steps, and its `weights` at the best of them by `metric`.

    After `patience` scores in a row that are no better than the best it is `out_of_patience`. `lowest` and `latest` are
    the rows' losses (nats) and answer tokens, (2, rows) float64, at the lowest loss and at the last score. Where it
    `keeps_rows`, `rows` are the losses, tokens and hits, (3, rows) float64, at every score.
    """

    metric: str
    patience: int | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    overfits: bool = False
    lowest: Tensor = field(default_factory=lambda: torch.zeros(2, 0))
    latest: Tensor = field(default_factory=lambda: torch.zeros(2, 0))
    keeps_rows: bool = False
    rows: list[Tensor] = field(default_factory=list)

    def note(self, step: int, train_loss: float, scored: Scored, weights: dict[str, Tensor]) -> bool:
        """Add the scores after `step`; `train_loss` is the mean of the steps since the last ones.

        Returns whether they are the best so far, in which case `weights` are kept.
        """
        scores = scored.scores
        value = scores[self.metric]
        found = scored.rows.nats, scored.rows.tokens, scored.rows.hits
        values = torch.stack([torch.tensor(own, dtype=torch.float64) for own in found])
        self.latest = values[:2]
        if self.keeps_rows:
            self.rows.append(values)
        if scores["loss"] < min((line["loss"] for line in self._numbers()), default=math.inf):
            self.lowest = self.latest
        better = math.isfinite(value) and (self.best_step is None or self._better(value, self.best_value))
        self.scores.append({"step": step, "train_loss": train_loss, **scores})
        if better:
            self.best_step, self.weights = step, weights
        return better

    @property
    def best_value(self) -> float:
        return next(line[self.metric] for line in self.scores if line["step"] == self.best_step)

    @property
    def out_of_patience(self) -> bool:
        if self.patience is None or self.best_step is None:
            return False
        return sum(line["step"] > self.best_step for line in self.scores) >= self.patience

    def overfitting(self) -> str:
        """A word of advice, once, when held-out loss rises beyond chance while training loss falls."""
        if self.overfits or len(self.scores) < 3:
            return ""
        lowest = min(self._numbers(), default=self.scores[0], key=lambda line: line["loss"])
        now, before = self.scores[-1], self.scores[-2]
        risen = now["loss"] > before["loss"] > lowest["loss"] or now["loss"] > (1 + 5 * RISE) * lowest["loss"]
        if not risen or now["loss"] < (1 + RISE) * lowest["loss"] or now["train_loss"] >= lowest["train_loss"]:
            return ""
        if not self._beyond_chance():
            return ""
        self.overfits = True
        return (
            f"overfitting: held-out loss has risen from {lowest['loss']:.3f} (step {lowest['step']}) to "
            f"{now['loss']:.3f} (step {now['step']}) on {self.latest.shape[1]} rows, while training loss fell from "
            f"{lowest['train_loss']:.3f} to {now['train_loss']:.3f}. Try dropout of 0.05 to 0.2, fewer epochs, a "
            f"lower rank, or more rows; the adapter that is kept is the best one, not the last."
        )

    def _numbers(self) -> list[dict[str, Any]]:
        return [line for line in self.scores if math.isfinite(line["loss"])]

    def _beyond_chance(self) -> bool:
        """Whether the rows' losses are above those of the lowest score by more than chance (2.5 %, one-sided)."""
        if self.lowest.shape != self.latest.shape or self.latest.shape[1] < FEW:
            return False
        found = mean_interval((self.latest[0] - self.lowest[0]).numpy(), self.latest[1].numpy())
        return found is not None and found[0] > 0

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in KEPT}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in KEPT:
            setattr(self, name, state[name])

    def _better(self, value: float, than: float) -> bool:
        return value > than if self.metric in HIGHER else value < than
