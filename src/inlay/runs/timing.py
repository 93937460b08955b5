"""How long a step's gradients take, without a change to what is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bank.bank import Bank
from inlay.data.encode import Example
from inlay.runtime.forward import Segment
from inlay.runtime.memory import TokenBudget
from inlay.runtime.tasks import Task
from inlay.training.gradients import Step, step_gradients
from inlay.training.learner import Learner

__all__ = ["Clock", "base_seconds", "gradient_seconds", "wait"]

Clock = Callable[[], float]


def gradient_seconds(
    bank: Bank, learner: Learner, rows: Sequence[Example], budget: TokenBudget, task: Task, recompute: bool = False,
    clock: Clock = time.perf_counter,
) -> float:  # fmt: skip
    """Seconds of a learner's step on `rows` up to its optimizer. Its parameters, its count of steps and torch's
    generators stay as they were; it has no gradients afterwards."""
    segments = [_segment(learner, row) for row in rows]
    counts = {learner.plan.name: max(1, sum(task.count(row) for row in rows))}
    step = Step([learner], segments, counts, "a trial", recompute)
    own = TokenBudget(budget.tokens, None, budget.device)
    state = torch.get_rng_state()
    wait(budget.device)
    begun = clock()
    try:
        step_gradients(bank, step, segments, own, task)
        wait(budget.device)
        return clock() - begun
    finally:
        learner.forget_gradients()
        torch.set_rng_state(state)


def _segment(learner: Learner, row: Example) -> Segment:
    plan = learner.plan
    return Segment(plan.name, row, plan.label_smoothing, plan.neftune_alpha, plan.seed, learner.step)


def base_seconds(
    bank: Bank, rows: Sequence[Example], budget: TokenBudget, task: Task, recompute: bool = False,
    clock: Clock = time.perf_counter,
) -> float:  # fmt: skip
    """Seconds of the base's forward and backward on `rows`, down to what it looked up for its tokens: what training
    takes with nothing trained."""
    looked_up: list[Tensor] = []

    def leaf(module: Any, given: Any, out: Tensor) -> Tensor:
        looked_up.append(out.detach().requires_grad_())
        return looked_up[-1]

    handles = [module.register_forward_hook(leaf) for module in _tables(bank.model)]
    wait(budget.device)
    begun = clock()
    try:
        with torch.enable_grad(), bank.recomputing() if recompute else nullcontext():
            losses = task.losses(bank, [Segment(None, row) for row in rows])
            torch.autograd.grad(torch.cat(losses).sum(), looked_up, allow_unused=True)
        wait(budget.device)
        return clock() - begun
    finally:
        for handle in handles:
            handle.remove()


def _tables(model: Any) -> list[Any]:
    """The modules that look tokens up: encoder and decoder may each have one over the same weight."""
    table = model.get_input_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is table.weight] or [table]


def wait(device: torch.device) -> None:
    """Until a device that works on its own is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
