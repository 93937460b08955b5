"""One learner of a run: when it is scored, its best checkpoint, and the numbers of its last steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from inlay.evaluation.score import Items
from inlay.training.learner import Learner

from .best import BestCheckpoint

__all__ = ["Due", "Progress", "every"]


class Progress:
    """A `learner` with its `best` checkpoint. It is scored on `rows` whenever that is `due` after one of its steps.

    `seconds` is the run's time up to its last step, scoring left out. One that is `kept` is so because people asked
    for it: it stays to its end whatever its scores are.
    """

    def __init__(self, learner: Learner, best: BestCheckpoint, rows: Items, due: Due) -> None:
        self.learner, self.best, self.rows, self._due = learner, best, rows, due
        self.seconds, self.kept = 0.0, False
        self._losses = (0.0, 0)
        self._before = (learner.step, learner.tokens)

    @property
    def name(self) -> str:
        return self.learner.plan.name

    @property
    def kept_step(self) -> int:
        """The step whose weights are kept as the best."""
        return self.learner.sound if self.best.best_step is None else self.best.best_step

    @property
    def score_due(self) -> bool:
        """Whether the learner is to be scored after its last step."""
        return bool(self.rows) and (not self.learner.live or self._due(self))

    def advance(self, seconds: float) -> int:
        """Take in the learner's last step; returns its tokens, 0 where there was none."""
        before, self._before = self._before, (self.learner.step, self.learner.tokens)
        if self._before == before:
            return 0
        self.seconds = seconds
        self._losses = self._losses[0] + self.learner.loss, self._losses[1] + 1
        return self.learner.tokens - before[1]

    def mean_loss(self) -> float:
        """The mean training loss (nats) of the steps since the last call; 0 where there are none."""
        total, steps = self._losses
        self._losses = (0.0, 0)
        return total / max(steps, 1)

    def state(self) -> dict[str, Any]:
        own = {"seconds": self.seconds, "losses": self._losses, "kept": self.kept}
        return {"learner": self.learner.state(), "best": self.best.state(), **own}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`. Raises: FormatError where it is another learner's."""
        self.learner.restore(state["learner"])
        self.best.restore(state["best"])
        self.seconds, self._losses, self.kept = state["seconds"], state["losses"], state["kept"]
        self._before = (self.learner.step, self.learner.tokens)


Due = Callable[[Progress], bool]
"""Whether a learner is to be scored after its last step; one that has stopped is scored in any case."""


def every(steps: int) -> Due:
    """Due after each so many steps of its own."""
    return lambda own: own.learner.step % steps == 0
