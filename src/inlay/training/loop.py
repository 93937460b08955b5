"""The one training loop: every step is one stream of tokens in which each live learner has its own segments."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import torch

from inlay.bank.adapter import Adapter
from inlay.bank.bank import Bank
from inlay.data.encode import Example
from inlay.methods.contract import Method
from inlay.runtime.forward import Segment, batches
from inlay.runtime.memory import TokenBudget, bound_kernels, with_backoff
from inlay.runtime.tasks import GENERATE, Task

from .gradients import ALONE, Shares, Step, step_gradients
from .learner import Learner
from .plan import Plan
from .starting import Rows, rows_before

__all__ = ["add_learners", "train", "train_steps"]

TRIED = 4
"""Rows of the last step, its shortest, that the finished adapter is tried on."""


def train(
    bank: Bank, plans: Sequence[Plan], examples: Sequence[Example], tokens_at_once: int = 4096, recompute: bool = False,
    task: Task = GENERATE,
) -> list[Learner]:  # fmt: skip
    """Add an adapter for each plan and train all of them together on `examples` to the end; see `train_steps`."""
    learners = add_learners(bank, plans, len(examples), task=task, examples=examples)
    budget = TokenBudget(tokens_at_once, device=next(bank.model.parameters()).device)
    for _ in train_steps(bank, learners, examples, budget, recompute, task):
        pass
    return learners


def add_learners(
    bank: Bank, plans: Sequence[Plan], rows: int, begun: Mapping[str, Adapter] | None = None, task: Task = GENERATE,
    examples: Rows | None = None, chosen: Mapping[str, Sequence[Method]] | None = None,
) -> list[Learner]:  # fmt: skip
    """A learner for each plan, with a new adapter of its name in `bank`; adapters in `begun` keep the values they have.
    A `task` may add parts to a plan's method. Methods that begin from data see some of the `examples`; `chosen` holds,
    by the name of a plan, those that have seen them.

    `rows` is the number of examples that will be trained on. Raises: UsageError where the base or a method cannot be
    trained so.
    """
    bound_kernels(len({repr(plan.method) for plan in plans}))
    task.check(bank)
    known = begun or {}
    adapters: list[Adapter] = []
    for plan in plans:
        methods = (chosen or {}).get(plan.name) or task.methods(plan.method)
        made = known.get(plan.name)
        seen = None if made is not None else rows_before(bank, plan, methods, examples, task)
        adapters.append(made or bank.add(plan.name, methods, seed=plan.seed, rows=seen))
        adapters[-1].chosen |= plan.name in (chosen or {})
    for plan, adapter in zip(plans, adapters, strict=True):
        adapter.seed = plan.seed
    return [Learner(plan, adapter, rows) for plan, adapter in zip(plans, adapters, strict=True)]


def train_steps(
    bank: Bank, learners: Sequence[Learner], examples: Rows, budget: TokenBudget, recompute: bool = False,
    task: Task = GENERATE, shares: Shares = ALONE,
) -> Generator[list[Learner], None, None]:  # fmt: skip
    """Train `learners` from where they are until each has stopped; yields, after every step, those that took it.

    Each learner equals what it would be alone: its own sampler, dropout, optimizer, schedule, clipping and stop. Its
    loss is the sum of the losses that `task` finds in its own examples of the step, by their number. A step of more
    tokens than `budget` allows is taken in several forwards with the same gradients; `recompute` saves memory by
    computing each block again in the backward (gradient checkpointing). `shares` spreads a step over processes.

    `learners` is read anew before each step: between two steps the consumer may stop some, add others, or leave the
    loop. Learners of any age share the forwards.
    """
    bank.model.eval()  # the base is frozen, and its own dropout would tie learners to one another
    while live := [learner for learner in learners if learner.live]:
        drawn = {learner.plan.name: learner.batch(examples) for learner in live}
        step = _step(live, drawn, task, recompute)
        losses = shares.gradients(step, budget, lambda own, step=step: step_gradients(bank, step, own, budget, task))
        for learner in live:
            name = learner.plan.name
            learner.update(losses.means[name], sum(len(e.ids) for e in drawn[name]), losses.suspects[name])
            if not learner.live and not learner.diverged:
                _check_end(bank, learner, drawn[name], budget, task)
        yield live


def _step(live: Sequence[Learner], drawn: Mapping[str, Sequence[Example]], task: Task, recompute: bool) -> Step:
    segments = [
        Segment(own.plan.name, e, own.plan.label_smoothing, own.plan.neftune_alpha, own.plan.seed, own.step)
        for own in live for e in drawn[own.plan.name]
    ]  # fmt: skip
    counts = {name: sum(task.count(e) for e in batch) for name, batch in drawn.items()}
    return Step(live, segments, counts, f"step {min(learner.step for learner in live) + 1}", recompute)


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
