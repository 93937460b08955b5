"""How long a run will take, before its first step: a step's gradients are tried on some of its rows."""

from __future__ import annotations

import time
from collections.abc import Sequence

from inlay.bank.bank import Bank
from inlay.data.encode import Example
from inlay.data.prepare import token_counts
from inlay.data.typical import typical_rows
from inlay.runtime.memory import TokenBudget
from inlay.runtime.tasks import GENERATE, Task
from inlay.training.learner import Learner

from .timing import Clock, gradient_seconds

__all__ = ["course_seconds"]

LARGE = {"cpu": 512}
"""Tokens of the larger trial at most, by the kind of device."""
OTHERWISE = 4096
SMALLER = 4
"""How many times smaller the other trial is."""
SHARE = 64
"""How many times longer than its trials a course must be to be worth them."""


def course_seconds(
    bank: Bank, learner: Learner, examples: Sequence[Example], budget: TokenBudget, task: Task = GENERATE,
    recompute: bool = False, clock: Clock = time.perf_counter,
) -> float | None:  # fmt: skip
    """Seconds of all steps of a learner's course, scoring and optimizer left out, by the line through two trials; None
    where the trials would take more than a small share of it. Nothing of the learner changes."""
    sizes = token_counts(examples)
    a_step = float(sizes.mean()) * min(learner.plan.batch_size, len(sizes))
    large = min(a_step, LARGE.get(budget.device.type, OTHERWISE))
    few, many = (typical_rows(examples, tokens) for tokens in (large / SMALLER, large))
    tried = sum(len(row.ids) for row in (*few, *many))
    if learner.total * a_step < SHARE * 2 * tried:
        return None

    def seconds(rows: Sequence[Example]) -> tuple[float, float]:
        """Tokens and seconds of the second trial; the first one meets what is cold."""
        _, taken = (gradient_seconds(bank, learner, rows, budget, task, recompute, clock) for _ in range(2))
        return float(sum(len(row.ids) for row in rows)), taken

    return learner.total * _on_line(seconds(few), seconds(many), a_step)


def _on_line(few: tuple[float, float], many: tuple[float, float], tokens: float) -> float:
    """What so many tokens take; in proportion to the larger trial where the line would go below zero."""
    (less, short), (more, long) = few, many
    slope = (long - short) / (more - less) if more > less else 0.0
    return long + slope * (tokens - more) if 0 < slope * more <= long else long * tokens / more
