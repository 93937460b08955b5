"""What a race may cost, in tokens or in time, and how long a course of its contenders may be for that."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from inlay.data.encode import Choices
from inlay.data.prepare import Examples
from inlay.evaluation.score import Items, score
from inlay.runs.planning import Opened
from inlay.runtime.tasks import Task
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan

from . import latency, training_cost
from .rungs import Shares, scored, work
from .settings import Budget

__all__ = ["Speed", "course_tokens", "measured"]

TRIED = 32
"""Rows that are scored to see how long that takes."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second: `training` in a stream of all contenders, and `scoring`."""

    training: float
    scoring: float


def measured(opened: Opened, plans: Sequence[Plan], task: Task, examples: Examples, choosing: Items) -> Speed:
    """Take two steps with copies of all contenders and score them on some rows; the second step counts. Nothing of it
    stays."""
    names = [f"{plan.name}.trial" for plan in plans]
    state, at_once = torch.get_rng_state(), opened.budget.tokens
    tried = [
        replace(plan, name=name, steps=None, epochs=1.0, stop_after=2) for plan, name in zip(plans, names, strict=True)
    ]
    learners = add_learners(opened.bank, tried, len(examples), task=task, examples=examples)
    try:
        marks = [time.perf_counter()]
        for _ in train_steps(
            opened.bank, learners, examples, opened.budget, opened.settings.gradient_checkpointing, task
        ):
            marks.append(time.perf_counter())
        tokens = sum(learner.tokens for learner in learners)
        steps = len(marks) - 1
        trained = tokens / steps / (marks[-1] - marks[-2]) if steps else 1.0
        rows, begun = choosing.first(TRIED), time.perf_counter()
        score(opened.bank, rows, names, opened.budget)
        read = len(names) * _tokens(rows)
        return Speed(trained, read / (time.perf_counter() - begun))
    finally:
        for name in names:
            opened.bank.remove(name)
        opened.budget.tokens = at_once  # where memory was short, it is again in the race, which writes it down
        torch.set_rng_state(state)


def course_tokens(
    budget: Budget, speed: Speed | None, contenders: int, shares: Shares, choosing: float, final: float
) -> float:
    """How many tokens a whole course may have: of the budget, less what scoring takes (and of a time, less what the
    measuring of costs may take), divided by the courses that the race is made of. `choosing` and `final` are tokens
    of one scoring of a contender on those rows."""
    if budget.tokens is not None:
        return budget.tokens / work(contenders, shares)
    assert budget.seconds is not None and speed is not None
    reading = (sum(scored(contenders, shares)) * choosing + (contenders + 1) * final) / speed.scoring
    return (
        max(0.0, (1 - latency.SHARE - training_cost.SHARE) * budget.seconds - reading)
        * speed.training
        / work(contenders, shares)
    )


def _tokens(items: Items) -> int:
    return sum(_read(item) if isinstance(item, Choices) else len(item.ids) for item in items.items)


def _read(choices: Choices) -> int:
    """Tokens that the words of a labelled row take, each behind the prompt."""
    return sum(len(choices.prompt) + len(ids) for _, ids in choices.words)
