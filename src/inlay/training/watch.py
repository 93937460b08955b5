"""Which state of an adapter is the best, when to stop, and whether it learns its rows by heart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Watch"]

HIGHER = ("accuracy", "f1", "exact_match")
"""Metrics of which more is better; of the others, less is."""
RISE = 0.02
"""By which share held-out loss stands above its lowest when an adapter is said to overfit."""


@dataclass
class Watch:
    """Held-out scores of one adapter over its steps, and the parameters at the best of them by `metric`.

    After `patience` scores in a row that are not better than the best, it is `stale`.
    """

    metric: str
    patience: int | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    overfits: bool = False

    def note(self, step: int, train_loss: float, scores: Mapping[str, float], values: dict[str, Tensor]) -> bool:
        """Take in the scores after `step`, where the steps since the last ones had the mean `train_loss`; returns
        whether they are the best so far, in which case `values` are kept.
        """
        value = scores[self.metric]
        better = math.isfinite(value) and (self.best_step is None or self._better(value, self.best_value))
        self.scores.append({"step": step, "train_loss": train_loss, **scores})
        if better:
            self.best_step, self.best = step, values
        return better

    @property
    def best_value(self) -> float:
        return next(line[self.metric] for line in self.scores if line["step"] == self.best_step)

    @property
    def stale(self) -> bool:
        if self.patience is None or self.best_step is None:
            return False
        return sum(line["step"] > self.best_step for line in self.scores) >= self.patience

    def overfitting(self) -> str:
        """A word of advice, once, when held-out loss rises while training loss falls."""
        if self.overfits or len(self.scores) < 3:
            return ""
        lowest = min(self.scores, key=lambda line: line["loss"])
        now, before = self.scores[-1], self.scores[-2]
        risen = now["loss"] > before["loss"] > lowest["loss"] or now["loss"] > (1 + 5 * RISE) * lowest["loss"]
        if not risen or now["loss"] < (1 + RISE) * lowest["loss"] or now["train_loss"] >= lowest["train_loss"]:
            return ""
        self.overfits = True
        return (
            f"overfitting: held-out loss has risen from {lowest['loss']:.3f} (step {lowest['step']}) to "
            f"{now['loss']:.3f} (step {now['step']}) while training loss fell from {lowest['train_loss']:.3f} to "
            f"{now['train_loss']:.3f}. Try dropout of 0.05 to 0.2, fewer epochs, a lower rank, or more rows; the "
            f"adapter that is kept is the best one, not the last."
        )

    def state(self) -> dict[str, Any]:
        return {"scores": self.scores, "best_step": self.best_step, "best": self.best, "overfits": self.overfits}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in ("scores", "best_step", "best", "overfits"):
            setattr(self, name, state[name])

    def _better(self, value: float, than: float) -> bool:
        return value > than if self.metric in HIGHER else value < than
