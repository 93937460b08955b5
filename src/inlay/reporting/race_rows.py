"""What contenders of a race made of each final row, so that two of them can be compared pair by pair."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inlay.evaluation.compare import Comparison, compare
from inlay.evaluation.head_rows import NumberScores
from inlay.evaluation.rows import RowScores
from inlay.files import json_lines

from .words import is_number

__all__ = ["FinalRows", "paired", "read_final_rows"]

A_ROW = "loss a row"
"""The mean of the rows' losses, for records that do not say how many tokens a row has."""


@dataclass(frozen=True)
class FinalRows:
    """The scores of an adapter on the final rows; `keys` tell which rows they are. `weighed` says whether the rows'
    tokens are known, without which means over tokens cannot be made."""

    keys: tuple[str, ...]
    scores: RowScores
    weighed: bool = True


def read_final_rows(path: Path) -> FinalRows | None:
    """The rows of a final.jsonl; None where there are none, or one of them cannot be read: pairs need all of them."""
    try:
        rows = [json.loads(line) for line in json_lines(path)]
        return _rows(rows) if rows and all(isinstance(row, dict) for row in rows) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def paired(own: FinalRows | None, other: FinalRows | None, metric: str | None) -> Comparison | None:
    """`own` less `other` by the metric, or by the loss where the rows do not tell it. None where they are not of the
    same rows, or a loss is no number."""
    if own is None or other is None or own.keys != other.keys or type(own.scores) is not type(other.scores):
        return None
    weighed = own.weighed and other.weighed
    usable = metric in own.scores.scores() and (weighed or metric == "exact_match")
    found = compare(own.scores, other.scores, metric if metric is not None and usable else "loss")
    if not is_number(found.difference):
        return None
    if weighed or usable:
        return found
    return Comparison(A_ROW, found.difference, found.interval, found.rows, found.better)


def _rows(rows: Sequence[Mapping[str, Any]]) -> FinalRows:
    keys = tuple(json.dumps([row.get(name) for name in ("where", "prompt", "answer", "label")]) for row in rows)
    numbers = np.arange(len(rows))
    if "probabilities" in rows[0]:
        return FinalRows(keys, _labelled(rows))
    if "number" in rows[0]:
        true, said = [float(row["answer"]) for row in rows], [_real(row["number"]) for row in rows]
        return FinalRows(keys, NumberScores.of_numbers(numbers.tolist(), true, said))
    weighed = all("tokens" in row and "hits" in row for row in rows)
    tokens = np.array([row["tokens"] if weighed else 1 for row in rows], np.int64)
    hits = np.array([row["hits"] if weighed else bool(row["exact"]) for row in rows], np.int64)
    losses = np.array([_real(row["loss"]) for row in rows], np.float64)
    return FinalRows(keys, RowScores(numbers, losses * tokens.astype(np.float64), tokens, hits), weighed)


def _labelled(rows: Sequence[Mapping[str, Any]]) -> RowScores:
    labels = [*rows[0]["probabilities"]]
    chances = np.array([[_real(row["probabilities"][label]) for label in labels] for row in rows], np.float64)
    right = np.array([labels.index(str(row["label"])) for row in rows])
    said = np.array([labels.index(str(row["said"])) for row in rows])
    with np.errstate(divide="ignore"):
        nats = -np.log(chances[np.arange(len(rows)), right])
    ones = np.ones(len(rows), np.int64)
    return RowScores(
        np.arange(len(rows)), nats, ones, (said == right).astype(np.int64), tuple(labels), right, said, chances
    )


def _real(value: Any) -> float:
    return math.nan if value is None else float(value)
