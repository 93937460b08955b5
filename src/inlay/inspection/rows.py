"""What rows say of an adapter: calibration, the rows and the words that it moved most against the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inlay.bank.bank import Bank
from inlay.data.encode import PIECE, Choices, Example
from inlay.evaluation.rows import RowScores
from inlay.runtime.forward import Segment, answer_logits, batches
from inlay.runtime.memory import TokenBudget, with_backoff

from .words_near import shown

__all__ = ["calibration_error", "first_moves", "most_moved", "row_changes", "token_calibration"]

BINS = 10
LEAST = 1e-3
MOVED_ROWS = 32
"""Rows whose first answer token is looked at, for the words that moved."""
CALIBRATED_ROWS = 64
"""Rows whose answers' tokens calibration is measured on."""


def calibration_error(rows: RowScores) -> float | None:
    """The expected calibration error of labelled rows: sum over `BINS` equal bins of confidence, weighted by their
    share of rows, of |mean confidence - accuracy|; None for rows without labels.

    Paper: Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv:1706.04599).
    """
    if rows.probabilities is None or rows.right is None or rows.predicted is None or not len(rows):
        return None
    return _expected_error(rows.probabilities.max(1), (rows.predicted == rows.right).astype(np.float64))


def _expected_error(sure: np.ndarray, hits: np.ndarray) -> float:
    """Of the probabilities (n,) of what was said, and whether each was right (n,)."""
    place = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    return float(np.abs(np.bincount(place, sure - hits, BINS)).sum() / len(sure))


@torch.no_grad()
def token_calibration(
    bank: Bank, names: Sequence[str | None], items: Sequence[Choices | Example], budget: TokenBudget
) -> tuple[dict[str | None, float], int]:
    """The expected calibration error of each of `names` (None is the base) over the answers' tokens of at most
    `CALIBRATED_ROWS` rows of text, as `calibration_error` has it of labels: the surest next token, with what stood
    before it as in the data. With the number of tokens, 0 where there are none.
    """
    chosen = [one for one in items[:CALIBRATED_ROWS] if isinstance(one, Example) and any(one.loss_mask[1:])]
    sure: dict[str | None, list[Tensor]] = {name: [] for name in names}
    hits: dict[str | None, list[Tensor]] = {name: [] for name in names}
    segments = [Segment(name, example) for example in chosen for name in names]
    for group in batches(segments, budget):
        logits, labels, counts = with_backoff(budget, "looking", lambda group=group: answer_logits(bank, group))
        pieces = zip(group, logits.float().split(counts), labels.split(counts), strict=True)
        for segment, own, right in pieces:
            assert segment.route is None or isinstance(segment.route, str)
            most, said = own.softmax(-1).max(-1)
            sure[segment.route].append(most.double().cpu())
            hits[segment.route].append((said == right).double().cpu())
    count = sum(len(one) for one in sure[names[0]]) if names else 0
    if not count:
        return {}, 0
    return {n: _expected_error(torch.cat(sure[n]).numpy(), torch.cat(hits[n]).numpy()) for n in names}, count


def row_changes(base: RowScores, own: RowScores, count: int = 5) -> dict[str, list[dict[str, float]]]:
    """The rows whose loss fell and rose most against the base's, with both losses, each a mean over a row's tokens."""
    ours, theirs = own.nats / own.tokens, base.nats / base.tokens
    apart = ours - theirs
    order = np.argsort(apart, kind="stable")

    def told(which: Sequence[int], sign: int) -> list[dict[str, float]]:
        return [
            {"row": int(own.samples[n]), "base": float(theirs[n]), "adapter": float(ours[n])}
            for n in which if sign * apart[n] > 0
        ]  # fmt: skip

    return {"improved": told(order[:count].tolist(), -1), "worsened": told(order[::-1][:count].tolist(), 1)}


def row_words(items: Sequence[Choices | Example], tokenizer: Any, most: int = 160) -> dict[int, str]:
    """By the number of a row, the end of its prompt and its answer in words."""
    found: dict[int, str] = {}
    for item in items:
        if isinstance(item, Choices):
            text = f"{tokenizer.decode(item.prompt)} → {item.label}"
        else:
            text = tokenizer.decode([token for token in item.ids])
        number = item.sample % (1 << PIECE)
        found.setdefault(number, text if len(text) <= most else "…" + text[-most:])
    return found


def most_moved(base: Tensor, own: Tensor, count: int = 5) -> dict[str, list[tuple[int, float, float]]]:
    """Of mean probabilities (words,) of the base and of the adapter: the words that gained and lost most, more than
    `LEAST`, each with both."""
    apart = own - base

    def told(values: Tensor, sign: int) -> list[tuple[int, float, float]]:
        chosen = values.topk(min(count, len(values))).indices.tolist()
        return [(n, float(base[n]), float(own[n])) for n in chosen if sign * float(apart[n]) > LEAST]

    return {"gained": told(apart, 1), "lost": told(-apart, -1)}


@torch.no_grad()
def first_moves(
    bank: Bank, name: str, items: Sequence[Choices | Example], tokenizer: Any, budget: TokenBudget
) -> dict[str, list[dict[str, Any]]]:
    """The words whose probability as the first of an answer (of labels, as the first that tells them apart) moved
    most, on the mean of at most `MOVED_ROWS` rows."""
    chosen = [one for one in items[:MOVED_ROWS] if isinstance(one, Choices) or any(one.loss_mask[1:])]
    examples = [_answered(item) for item in chosen]
    means: dict[str | None, Tensor | float] = {None: 0.0, name: 0.0}
    segments = [Segment(route, example) for example in examples for route in (None, name)]
    for group in batches(segments, budget):
        logits, _, counts = with_backoff(budget, "looking", lambda group=group: answer_logits(bank, group))
        for segment, own in zip(group, logits.float().split(counts), strict=True):
            route = segment.route
            assert route is None or isinstance(route, str)
            means[route] = means[route] + own[0].softmax(-1).double().cpu() / len(examples)
    base, own = means[None], means[name]
    if not isinstance(base, Tensor) or not isinstance(own, Tensor):
        return {"gained": [], "lost": []}
    width = min(len(base), len(own))  # an adapter of added tokens has more
    moved = most_moved(base[:width], own[:width])
    return {
        key: [
            {"word": shown(tokenizer, [n])[0], "id": n, "base": b, "adapter": a} for n, b, a in found
        ]
        for key, found in moved.items()
    }  # fmt: skip


def _answered(item: Choices | Example) -> Example:
    """A row with the first of its answer's tokens alone bearing loss; of labels, the first that tells them apart."""
    if isinstance(item, Choices):
        ids = next(ids for label, ids in item.words if label == item.label)
        alike = next((n for n in range(len(ids)) if len({own[: n + 1] for _, own in item.words}) > 1), 0)
        head, ids = (*item.prompt, *ids[:alike]), ids[alike : alike + 1]
        return Example(
            (*head, *ids), (False,) * len(head) + (True,), item.sample, virtual_at=item.virtual_at
        )  # fmt: skip
    first = next(n for n, bears in enumerate(item.loss_mask) if bears and n)
    mask = tuple(n == first for n in range(first + 1))
    return Example(item.ids[: first + 1], mask, item.sample, virtual_at=item.virtual_at)
