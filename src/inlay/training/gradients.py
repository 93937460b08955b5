"""The gradients of one step: of all its segments, or of the share of them that one of several processes takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from inlay.bank.bank import Bank
from inlay.runtime.forward import Segment, batches
from inlay.runtime.memory import TokenBudget, with_backoff
from inlay.runtime.tasks import Task

from .learner import Learner

__all__ = ["ALONE", "Shares", "Step", "StepLosses", "Work", "step_gradients"]


@dataclass(frozen=True)
class Step:
    """What one step of `learners` is made of: the `segments` of all, and by name the `counts` of losses of each.

    `where` names it for people; with `recompute`, blocks are computed again in the backward.
    """

    learners: Sequence[Learner]
    segments: Sequence[Segment]
    counts: Mapping[str, int]
    where: str
    recompute: bool = False


@dataclass(frozen=True)
class StepLosses:
    """By learner: the mean loss of its step (nats), and the samples whose own loss is no number."""

    means: dict[str, float]
    suspects: dict[str, list[int]]


Work = Callable[[Sequence[Segment]], StepLosses]
"""Fills the gradients of a step's learners from some of its segments."""


class Shares(Protocol):
    """How a step's segments are spread over `size` processes."""

    @property
    def size(self) -> int: ...

    def open(self, how: Mapping[str, Any]) -> None:
        """Tell the other processes how they open the base that this one has opened."""
        ...

    def gradients(self, step: Step, budget: TokenBudget, work: Work) -> StepLosses:
        """Fill the gradients of the step's learners from all its segments; `work` does this process's share."""
        ...


class _Alone:
    """One process does it all."""

    size = 1

    def open(self, how: Mapping[str, Any]) -> None:
        pass

    def gradients(self, step: Step, budget: TokenBudget, work: Work) -> StepLosses:
        return work(step.segments)


ALONE: Shares = _Alone()


def step_gradients(bank: Bank, step: Step, segments: Sequence[Segment], budget: TokenBudget, task: Task) -> StepLosses:
    """Fill the gradients of a step's learners from `segments`, some of its own, in the forwards that `budget` asks for.

    The means are what these segments add to those of the whole step. Raises: InlayError where one is too much for the
    memory there is.
    """

    def forget() -> None:
        for learner in step.learners:
            learner.forget_gradients()

    with ExitStack() as inside:
        inside.enter_context(bank.recomputing() if step.recompute else nullcontext())
        for learner in step.learners:
            inside.enter_context(learner.flat_gradients())
        return with_backoff(budget, step.where, lambda: _gradients(bank, step, segments, budget, task), forget)


def _gradients(bank: Bank, step: Step, segments: Sequence[Segment], budget: TokenBudget, task: Task) -> StepLosses:
    found = StepLosses(dict.fromkeys(step.counts, 0.0), {name: [] for name in step.counts})
    for group in batches(segments, budget):
        losses = task.losses(bank, group)
        budget.check()
        for name, value in _backward(group, losses, step.counts).items():
            found.means[name] += value
        for segment, own in zip(group, losses, strict=True):
            name = str(segment.route)
            if not math.isfinite(found.means[name]) and not bool(own.detach().isfinite().all()):
                found.suspects[name].append(segment.example.sample)
    return found


def _backward(group: Sequence[Segment], losses: Sequence[Tensor], counts: Mapping[str, int]) -> dict[str, float]:
    """Gradients of a group's share in each learner's mean of `counts` losses; returns those shares."""
    sums: dict[str, Tensor] = {}
    for segment, own in zip(group, losses, strict=True):
        name = str(segment.route)
        share = own.sum() / counts[name]
        sums[name] = sums[name] + share if name in sums else share
    torch.stack(list(sums.values())).sum().backward()
    return {name: float(value.detach()) for name, value in sums.items()}
