"""The rows of a run that is planned: counted, measured in tokens, and some of them made ready to be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from inlay.bank.bank import Bank
from inlay.bases.load import Base
from inlay.data.prepare import Examples, Prepared, prepare, token_counts
from inlay.data.targets import HeadEncoder, encoder_of, prepare_targets
from inlay.runs.dataset import Dataset
from inlay.runs.settings import Settings
from inlay.runtime.tasks import Task, task_of
from inlay.sites.positions import positions_of, table_size

__all__ = ["Material", "read_material"]

SEEN = 2048
"""Rows that are encoded: the others are taken to be like them."""


@dataclass(frozen=True)
class Material:
    """Training `rows`, of which some are `examples`; `per_row` examples come of one. `counts` says what became of
    those that were encoded."""

    task: Task
    examples: Examples
    rows: int
    per_row: float
    counts: Mapping[str, int]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of the examples."""
        return token_counts(self.examples)

    def steps(self, settings: Settings) -> int:
        """Optimizer steps of the whole course."""
        batches = -(-round(self.rows * self.per_row) // settings.batch_size)
        return settings.steps or max(1, round(settings.epochs * max(1, batches)))

    def step_tokens(self, settings: Settings) -> float:
        """Tokens of a step in the mean."""
        return float(self.lengths.mean()) * min(settings.batch_size, max(1.0, self.rows * self.per_row))


def read_material(settings: Settings, dataset: Dataset, base: Base, bank: Bank) -> Material:
    """Raises: UsageError where the base cannot do the task; DataError where no row can be learned from."""
    task = task_of(dataset.template, bank, base.fresh)
    task.check(bank)
    positions = positions_of(base.model)
    encoder = encoder_of(dataset.template)(
        base.tokenizer, dataset.template, settings.max_length, settings.virtual_tokens_at, positions,
        table_size(base.model),
    )  # fmt: skip
    some = dataset.rows[:SEEN]
    prepared: Any = prepare_targets(encoder, some) if isinstance(encoder, HeadEncoder) else prepare(encoder, some)
    assert isinstance(prepared, Prepared)
    share = len(prepared.examples) / len(some)
    return Material(task, prepared.examples, len(dataset.rows), share, prepared.counts)
