"""How long a step takes, and a token of an answer: a few of them are done, and the fastest counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from inlay.bases.heads import can_write
from inlay.data.encode import Example
from inlay.data.typical import typical_rows
from inlay.runtime.latency import token_times
from inlay.training.learner import Learner
from inlay.training.loop import train_steps

from .counting import Ground

__all__ = ["Clock", "Line", "Pace", "step_seconds", "token_seconds"]

Clock = Callable[[], float]
REPEATS = 2
"""Steps that are timed behind one that is not."""
NEW = 8
"""Tokens of an answer."""
SMALL, LARGE = 128, 512
"""Tokens of the two steps that the base is measured by."""


@dataclass(frozen=True)
class Line:
    """A step takes `fixed` seconds and `a_token` more for each of its tokens."""

    fixed: float
    a_token: float

    @classmethod
    def through(cls, few: tuple[float, float], many: tuple[float, float]) -> Line:
        """The line through two steps, each (tokens, seconds); through the larger alone where they say nothing."""
        (tokens, seconds), (more, longer) = few, many
        slope = (longer - seconds) / (more - tokens) if more > tokens else 0.0
        if slope <= 0 or slope * more > longer:
            return cls(0.0, longer / more)
        return cls(longer - slope * more, slope)

    def seconds(self, tokens: float) -> float:
        return self.fixed + self.a_token * tokens


@dataclass(frozen=True)
class Pace:
    """Of one candidate: seconds of the small step, and of a token of an answer; `row` and `large` are those of a step
    of one row and of the large step, which tell what a step takes whatever its tokens. None where it was not measured.
    """

    step: float
    token: float | None = None
    row: float | None = None
    large: float | None = None

    def seconds(self, other: Pace, of_other: float) -> float:
        """Of the candidate's step, where the `other` one's takes `of_other`: in proportion, with a part that does not
        grow by the tokens where steps of one row and large ones are known of both."""
        if None not in (steps := (self.row, self.large, other.row, other.large)):
            row, large, their_row, their_large = (own or 0.0 for own in steps)
            share = (large - row) / (their_large - their_row) if their_large > their_row else 0.0
            fixed = row - share * their_row
            if share > 0 and fixed > 0:
                return share * of_other + fixed
            return of_other * large / their_large
        return of_other * self.step / other.step


def step_seconds(ground: Ground, learner: Learner, rows: Sequence[Example], clock: Clock = time.perf_counter) -> float:
    """The seconds of a step on `rows`, the fastest of some; the learner must be over as many rows a step."""
    recompute = ground.settings.gradient_checkpointing
    steps = train_steps(ground.bank, [learner], rows, ground.budget, recompute, ground.task)
    marks = [clock()]
    with closing(steps):
        for _ in steps:
            _finish(ground)
            marks.append(clock())
            if len(marks) > REPEATS + 1:
                break
    taken = [later - earlier for earlier, later in pairwise(marks)]
    return min(taken[1:] or taken)


def token_seconds(
    ground: Ground, name: str | None, rows: int, clock: Clock = time.perf_counter
) -> tuple[float, float] | None:
    """Seconds until the first token of an answer for so many rows at once, and of each further one, by the adapter
    `name` (the base where it is None); the fastest of some. None where the base gives no text."""
    model: Any = ground.bank.model
    if ground.task.name != "generate" or not can_write(model):
        return None
    prompt = typical_rows(ground.examples, 1)[0]
    taken = [token_times(ground.bank, name, prompt, NEW, rows, clock) for _ in range(REPEATS + 1)][1:]
    return min(times[0] for times in taken), min(sum(times[1:]) for times in taken) / (NEW - 1)


def _finish(ground: Ground) -> None:
    """Wait for a device that works on its own."""
    if ground.budget.device.type == "cuda":
        torch.cuda.synchronize(ground.budget.device)
