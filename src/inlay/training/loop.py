"""The one training loop: every step is one stream of tokens in which each live learner has its own segments."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor

from inlay.bank.adapter import Adapter
from inlay.bank.bank import Bank
from inlay.data.encode import Example
from inlay.runtime.forward import Segment, batches
from inlay.runtime.memory import TokenBudget, bound_kernels, with_backoff
from inlay.runtime.tasks import GENERATE, Task

from .learner import Learner
from .plan import Plan

__all__ = ["add_learners", "train", "train_steps"]

TRIED = 4
"""Rows of the last step, its shortest, that the finished adapter is tried on."""


def train(
    bank: Bank, plans: Sequence[Plan], examples: Sequence[Example], tokens_at_once: int = 4096, recompute: bool = False,
    task: Task = GENERATE,
) -> list[Learner]:  # fmt: skip
    """Add an adapter for each plan and train all of them together on `examples` to the end; see `train_steps`."""
    learners = add_learners(bank, plans, len(examples), task=task)
    budget = TokenBudget(tokens_at_once, device=next(bank.model.parameters()).device)
    for _ in train_steps(bank, learners, examples, budget, recompute, task):
        pass
    return learners


def add_learners(
    bank: Bank, plans: Sequence[Plan], rows: int, begun: Mapping[str, Adapter] | None = None, task: Task = GENERATE
) -> list[Learner]:
    """A learner for each plan, with a new adapter of its name in `bank`; adapters in `begun` keep the values they have.
    A `task` may add parts to a plan's method.

    `rows` is the number of examples that will be trained on. Raises: UsageError where the base or a method cannot be
    trained so.
    """
    bound_kernels(len({repr(plan.method) for plan in plans}))
    task.check(bank)
    known = begun or {}
    adapters = [
        known.get(plan.name) or bank.add(plan.name, task.methods(plan.method), seed=plan.seed) for plan in plans
    ]
    for plan, adapter in zip(plans, adapters, strict=True):
        adapter.seed = plan.seed
    return [Learner(plan, adapter, rows) for plan, adapter in zip(plans, adapters, strict=True)]


def train_steps(
    bank: Bank, learners: Sequence[Learner], examples: Sequence[Example], budget: TokenBudget, recompute: bool = False,
    task: Task = GENERATE,
) -> Generator[list[Learner], None, None]:  # fmt: skip
    """Train `learners` from where they are until each has stopped; yields, after every step, those that took it.

    Each learner equals what it would be alone: its own sampler, dropout, optimizer, schedule, clipping and stop. Its
    loss is the sum of the losses that `task` finds in its own examples of the step, by their number. A step of more
    tokens than `budget` allows is taken in several forwards with the same gradients; `recompute` saves memory by
    computing each block again in the backward (gradient checkpointing).

    `learners` is read anew before each step: between two steps the consumer may stop some, add others, or leave the
    loop. Learners of any age share the forwards.
    """
    bank.model.eval()  # the base is frozen, and its own dropout would tie learners to one another
    while live := [learner for learner in learners if learner.live]:
        with bank.recomputing() if recompute else nullcontext():
            _step(bank, live, examples, budget, task)
        yield live


def _step(bank: Bank, live: list[Learner], examples: Sequence[Example], budget: TokenBudget, task: Task) -> None:
    drawn = {learner.plan.name: learner.batch(examples) for learner in live}

    def forget() -> None:
        for learner in live:
            learner.forget_gradients()

    where = f"step {min(learner.step for learner in live) + 1}"
    with ExitStack() as flat:
        for learner in live:
            flat.enter_context(learner.flat_gradients())
        means, suspects = with_backoff(budget, where, lambda: _gradients(bank, live, drawn, budget, task), forget)
    for learner in live:
        name = learner.plan.name
        learner.update(means[name], sum(len(e.ids) for e in drawn[name]), suspects[name])
        if not learner.live and not learner.diverged:
            _check_end(bank, learner, drawn[name], budget, task)


@torch.no_grad()
def _check_end(bank: Bank, learner: Learner, batch: list[Example], budget: TokenBudget, task: Task) -> None:
    """A last update that no further step would notice: whether the adapter still gives losses that are numbers."""
    tried = sorted(batch, key=lambda example: len(example.ids))[:TRIED]
    with learner.averaged_weights():
        for group in batches([Segment(learner.plan.name, example) for example in tried], budget):
            losses = with_backoff(budget, "the last step", lambda group=group: task.losses(bank, group))
            if not all(bool(own.isfinite().all()) for own in losses):
                break
        else:
            return
    learner.diverge("the last update makes losses that are no numbers", learner.step, [e.sample for e in tried])


def _gradients(
    bank: Bank, live: list[Learner], drawn: dict[str, list[Example]], budget: TokenBudget, task: Task
) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Fill the gradients of one step; returns each learner's mean loss, and its samples whose loss is no number."""
    means, suspects = dict.fromkeys(drawn, 0.0), {name: [] for name in drawn}
    counts = {name: sum(task.count(e) for e in batch) for name, batch in drawn.items()}
    segments = [
        Segment(own.plan.name, e, own.plan.label_smoothing, own.plan.neftune_alpha, own.plan.seed, own.step)
        for own in live for e in drawn[own.plan.name]
    ]  # fmt: skip
    for group in batches(segments, budget):
        losses = task.losses(bank, group)
        budget.check()
        for name, value in _backward(group, losses, counts).items():
            means[name] += value
        for segment, own in zip(group, losses, strict=True):
            if not math.isfinite(means[str(segment.route)]) and not bool(own.detach().isfinite().all()):
                suspects[str(segment.route)].append(segment.example.sample)
    return means, suspects


def _backward(group: list[Segment], losses: list[Tensor], counts: dict[str, int]) -> dict[str, float]:
    """Gradients of a group's share in each learner's mean of `counts` losses; returns those shares."""
    sums: dict[str, Tensor] = {}
    for segment, own in zip(group, losses, strict=True):
        name = str(segment.route)
        share = own.sum() / counts[name]
        sums[name] = sums[name] + share if name in sums else share
    torch.stack(list(sums.values())).sum().backward()
    return {name: float(value.detach()) for name, value in sums.items()}
