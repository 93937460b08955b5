"""What an adapter makes of rows without answers: labels with probabilities, or text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.bank.bank import Bank
from inlay.data.encode import Choices, Encoder
from inlay.data.rows import Row
from inlay.errors import DataError, DroppedRow, UsageError
from inlay.runtime.memory import TokenBudget

from .score import Items, score

__all__ = ["Prediction", "predicted_labels", "predicted_texts"]

Write = Callable[[Sequence[tuple[Sequence[int], int]]], list[str]]


@dataclass(frozen=True)
class Prediction:
    """The answer to one row: a label with the `probabilities` of all, a number, `tags`, or words; "" and the `problem`
    where none.
    """

    answer: str
    probabilities: dict[str, float] | None = None
    problem: str = ""
    tags: tuple[str, ...] = ()


def predicted_labels(
    bank: Bank, encoder: Encoder, rows: Sequence[Row], adapter: str | None, budget: TokenBudget
) -> list[Prediction]:
    """The likeliest label of each row, in the rows' order; a label that a row has is not looked at."""
    stand_in = next(iter(encoder.template.verbalizer))
    blank = [dataclasses.replace(row, values={**row.values, encoder.template.answer: stand_in}) for row in rows]
    found = _each(encoder.all_choices, blank)
    items = [item for item in found if isinstance(item, Choices)]
    labels = tuple(encoder.template.verbalizer)
    scored = score(bank, Items(items, labels, Counter(rows=len(items))), [adapter], budget)[adapter] if items else None
    each = iter([] if scored is None or scored.rows.probabilities is None else scored.rows.probabilities.tolist())
    made = []
    for item in found:
        if isinstance(item, DroppedRow):
            made.append(Prediction("", None, item.reason))
            continue
        shares = dict(zip(labels, next(each), strict=True))
        made.append(Prediction(max(shares, key=lambda label: shares[label]), shares))
    return made


def _each(make: Callable[[Sequence[Row]], list[Any]], rows: Sequence[Row]) -> list[Any]:
    """What `make` makes of the rows, a DroppedRow for each that is refused: a row's own fault stops no other."""
    try:
        return make(rows)
    except DataError as error:
        if len(rows) > 1:
            return [one for row in rows for one in _each(make, [row])]
        if isinstance(error, DroppedRow):
            return [error]
        where = rows[0].where
        if not error.what.startswith(where):
            raise
        return [DroppedRow(where, error.what.removeprefix(where).lstrip(": "))]


def predicted_texts(encoder: Encoder, rows: Sequence[Row], write: Write) -> Iterator[Prediction]:
    """The words that `write` puts behind the rows' prompts.

    Raises: UsageError for rows of plain text, which have no prompt.
    """
    if encoder.template.kind == "text":
        raise UsageError("rows of text alone have no prompt, and no labels to choose from", "Use `inlay generate`.")
    prompts = [one for row in rows for one in _each(lambda some: [encoder.prompt(some[0])], [row])]
    answers = iter(write([prompt for prompt in prompts if not isinstance(prompt, DroppedRow)]))
    for prompt in prompts:
        yield Prediction("", None, prompt.reason) if isinstance(prompt, DroppedRow) else Prediction(next(answers))
