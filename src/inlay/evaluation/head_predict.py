"""What adapters' heads say of rows without answers: labels with probabilities, numbers, tags."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.bank.bank import Bank
from inlay.data.rows import Row
from inlay.data.targets import HeadEncoder, Targeted
from inlay.errors import DataError, DroppedRow
from inlay.runtime.forward import Segment
from inlay.runtime.memory import TokenBudget, with_backoff
from inlay.runtime.tasks import head_outputs

from .heads import MOST, some
from .predict import Prediction

__all__ = ["predicted_by_head"]


def predicted_by_head(
    bank: Bank, encoder: HeadEncoder, rows: Sequence[Row], adapter: str | None, budget: TokenBudget
) -> list[Prediction]:
    """What the head of `adapter` says of each row, in the rows' order; answers that rows have are not looked at."""
    task, labels = encoder.template.task, tuple(encoder.template.verbalizer)
    made = [_targeted(encoder, row) for row in rows]
    items = [own for own in made if isinstance(own, Targeted)]
    outputs: list[Tensor] = []
    while len(outputs) < len(items):
        group = some(items[len(outputs) : len(outputs) + MOST], budget, 1)
        segments = [Segment(adapter, example) for example in group]
        with torch.no_grad():
            outputs += with_backoff(budget, "predicting", lambda segments=segments: head_outputs(bank, segments, task))
    found = iter(outputs)
    return [
        Prediction("", None, own.reason) if isinstance(own, DroppedRow) else _said(task, labels, next(found), own.cut)
        for own in made
    ]


def _targeted(encoder: HeadEncoder, row: Row) -> Targeted | DroppedRow:
    try:
        return encoder.targeted([row], answered=False)[0]
    except DroppedRow as dropped:
        return dropped
    except DataError as error:
        if not error.what.startswith(row.where):
            raise
        return DroppedRow(row.where, error.what.removeprefix(row.where).lstrip(": "))


def _said(task: str, labels: Sequence[str], output: Tensor, cut: int) -> Prediction:
    if task == "regress":
        return Prediction(repr(float(output[0, 0])))
    if task == "tag":
        tags = tuple(labels[int(n)] for n in output.argmax(-1))
        return Prediction(" ".join(tags), None, "row too long: its last words have no tag" if cut else "", tags)
    shares = dict(zip(labels, output[0].double().softmax(-1).tolist(), strict=True))
    return Prediction(max(shares, key=lambda label: shares[label]), shares)
