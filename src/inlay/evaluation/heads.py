"""Scores of adapters' heads: labels, numbers, tags."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from inlay.bank.bank import Bank
from inlay.data.encode import PIECE, Example
from inlay.data.targets import Targeted
from inlay.runtime.forward import Segment
from inlay.runtime.memory import TokenBudget, with_backoff
from inlay.runtime.tasks import head_outputs

from .head_rows import NumberScores, TagScores
from .rows import RowScores

__all__ = ["MOST", "head_rows", "some"]

MOST = 1024
"""Examples that are looked at for one forward."""


@torch.no_grad()
def head_rows(
    bank: Bank, task: str, labels: Sequence[str], examples: Sequence[Example], adapters: Sequence[str | None],
    budget: TokenBudget, on_rows: Callable[[int], None] | None = None,
) -> dict[str | None, RowScores]:  # fmt: skip
    """What each adapter scored on each of some examples, all in the same forwards."""
    bank.model.eval()
    outputs: dict[str | None, list[Tensor]] = {adapter: [] for adapter in adapters}
    done = 0
    while done < len(examples):
        group = some(examples[done : done + MOST], budget, len(adapters))
        segments = [Segment(adapter, example) for adapter in adapters for example in group]
        found = with_backoff(budget, "evaluation", lambda segments=segments: head_outputs(bank, segments, task))
        for n, adapter in enumerate(adapters):
            outputs[adapter] += [own.double().cpu() for own in found[n * len(group) : (n + 1) * len(group)]]
        done += len(group)
        if on_rows is not None:
            on_rows(len(group))
    return {adapter: _scored(task, labels, examples, own) for adapter, own in outputs.items()}


def some(examples: Sequence[Example], budget: TokenBudget, times: int) -> list[Example]:
    """The first of some examples, as many as `budget` has room for `times` over, one at least."""
    taken: list[Example] = []
    left = budget.tokens
    for example in examples:
        left -= times * len(example.ids)
        if taken and left < 0:
            break
        taken.append(example)
    return taken


def _scored(task: str, labels: Sequence[str], examples: Sequence[Example], outputs: Sequence[Tensor]) -> RowScores:
    samples = [example.sample & ((1 << PIECE) - 1) for example in examples]
    targets: list[Sequence[float]] = [e.targets if isinstance(e, Targeted) else () for e in examples]
    if task == "regress":
        said = [float(own[0, 0]) for own in outputs]
        return NumberScores.of_numbers(samples, [own[0] for own in targets], said)
    if task == "classify":
        right = [int(own[0]) for own in targets]
        found = torch.cat(list(outputs)).log_softmax(-1).numpy() if outputs else np.zeros((0, len(labels)))
        return RowScores.of_labels(samples, right, found, labels)
    nats, true, said_tags = [], [], []
    for own, output in zip(targets, outputs, strict=True):
        numbers = torch.tensor([int(n) for n in own])
        nats.append(float(torch.nn.functional.cross_entropy(output, numbers, reduction="sum")))
        true.append([labels[int(n)] for n in own])
        said_tags.append([labels[n] for n in output.argmax(-1).tolist()])
    return TagScores.of_tags(samples, nats, true, said_tags)
