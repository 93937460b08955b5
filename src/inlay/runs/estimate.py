"""How much memory a run will take, before its first step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from inlay.bank.bank import Bank
from inlay.data.encode import Example
from inlay.data.prepare import token_counts
from inlay.runtime.forward import Segment
from inlay.runtime.memory import MB, TokenBudget, current_memory_mb, saved_bytes
from inlay.runtime.tasks import GENERATE, Task
from inlay.training.learner import Learner

__all__ = ["estimate_mb", "step_tokens"]

KERNELS_MB = 150
"""What compiled kernels of a CPU's matrix products take; in bfloat16 it is up to twice as much."""
LONGEST = 256
"""Tokens of the row that is tried."""


def estimate_mb(
    bank: Bank, learners: Sequence[Learner], examples: Sequence[Example], budget: TokenBudget, task: Task = GENERATE,
    processes: int = 1,
) -> dict[str, float]:  # fmt: skip
    """`estimate_mb` for steps as they will be, `least_mb` where each forward takes one row; cuts `budget` to it.

    One row runs forward for each learner, and what it saves for its backward is counted; the largest step saves that
    much a token, spread over `processes`. The adapters' gradients, two moments of their optimizers and a copy from
    before each step come on top of the memory in use.
    """
    sizes = token_counts(examples)
    longest = int(sizes.max())
    tried = examples[int(np.where(sizes <= LONGEST, sizes, 0).argmax())]
    a_token = max(_saved(bank, learner, tried, task) for learner in learners) / len(tried.ids)
    tensors = [p for learner in learners for p in learner.parameters]
    states = 4 * sum(p.numel() * p.element_size() for p in tensors)
    fixed = current_memory_mb(budget.device) + states / MB + (KERNELS_MB if budget.device.type == "cpu" else 0)
    budget.fit(fixed, a_token / MB, longest)
    most = step_tokens(learners, sizes, budget, processes)
    return {"estimate_mb": fixed + a_token * most / MB, "least_mb": fixed + a_token * longest / MB}


def step_tokens(learners: Sequence[Learner], sizes: np.ndarray, budget: TokenBudget, processes: int = 1) -> int:
    """Tokens of the largest forward: a step of the longest rows of all learners, or what the budget allows of it.

    `sizes` (n,) are the examples' lengths. Of several `processes`, each takes an equal share, one row at least.
    """
    ordered = np.sort(sizes)
    whole = sum(int(ordered[-learner.plan.batch_size :].sum()) for learner in learners)
    return min(max(-(-whole // processes), int(ordered[-1])), max(budget.tokens, int(ordered[-1])))


def _saved(bank: Bank, learner: Learner, example: Example, task: Task) -> int:
    """Bytes that a step on one example saves for its backward."""
    plan = learner.plan
    segment = Segment(plan.name, example, seed=plan.seed, step=0)
    with torch.enable_grad():
        return saved_bytes(bank.model, lambda: task.losses(bank, [segment])[0])
