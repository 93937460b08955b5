"""The rows of a run that is planned: counted, measured in tokens, and some of them made ready to be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from inlay.bank.bank import Bank
from inlay.bases.load import Base
from inlay.data.encode import Encoder
from inlay.data.prepare import Examples, Prepared, prepare, token_counts
from inlay.data.scripts import scripts
from inlay.data.targets import HeadEncoder, encoder_of, prepare_targets
from inlay.data.typical import typical_rows
from inlay.runs.dataset import Dataset
from inlay.runs.settings import Settings
from inlay.runtime.tasks import Task, task_of
from inlay.sites.positions import positions_of, table_size

__all__ = ["Material", "read_material"]

WRITTEN = 4096
"""Tokens of the rows whose letters are looked at."""
SEEN = 2048
"""Rows that are encoded: the others are taken to be like them."""


@dataclass(frozen=True)
class Material:
    """Training `rows`, of which some are `examples`; `per_row` examples come of one. `counts` says what became of
    those that the `encoder` was given."""

    task: Task
    examples: Examples
    rows: int
    per_row: float
    counts: Mapping[str, int]
    encoder: Encoder

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of the examples."""
        return token_counts(self.examples)

    def writing(self, tokenizer: Any) -> tuple[dict[str, float], float | None]:
        """The shares of scripts in some of the examples, and their characters a token; None where they have none."""
        some = typical_rows(self.examples, WRITTEN)
        texts = [tokenizer.decode(row.ids, skip_special_tokens=True) for row in some]
        characters = sum(map(len, texts))
        return scripts(texts), characters / sum(len(row.ids) for row in some) if characters else None

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
    return Material(task, prepared.examples, len(dataset.rows), share, prepared.counts, encoder)
