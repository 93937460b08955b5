"""The rows that an adapter's methods see before its first step: the first of its own order, each run alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from inlay.bank.bank import Bank
from inlay.bank.starting import Batch
from inlay.data.encode import Example
from inlay.methods.contract import Method
from inlay.runtime.forward import Segment
from inlay.runtime.tasks import Task

from .plan import Plan

__all__ = ["Rows", "permutation", "rows_before", "rows_of"]

Rows = Sequence[Example] | Callable[[str | None], Sequence[Example]]
"""Examples as they are, or those of each place of virtual tokens: the same rows with another `virtual_at`."""


def rows_of(rows: Rows, plan: Plan) -> Sequence[Example]:
    """The examples that a learner of this plan has."""
    return rows(plan.virtual_tokens_at) if callable(rows) else rows


def permutation(seed: int, epoch: int, rows: int) -> Tensor:
    """The order (rows,) in which a learner of this seed goes over its rows."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def rows_before(bank: Bank, plan: Plan, methods: Sequence[Method], rows: Rows | None, task: Task) -> list[Batch] | None:
    """What `bank.add` shows the methods of a plan; None where they want nothing, or there are no examples."""
    wanted = max((part.start_rows for method in methods for part in method.parts()), default=0)
    if not wanted or rows is None:
        return None
    examples = rows_of(rows, plan)
    chosen = permutation(plan.seed, 0, len(examples))[:wanted].tolist()
    return [_alone(bank, examples[number], task) for number in chosen]


def _alone(bank: Bank, example: Example, task: Task) -> Batch:
    return Batch(partial(_loss, bank, example, task), answers=torch.tensor(example.loss_mask))


def _loss(bank: Bank, example: Example, task: Task) -> Tensor:
    """The mean loss of one example on the plain base."""
    return task.losses(bank, [Segment(None, example)])[0].mean()
