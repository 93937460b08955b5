"""Scores of adapters and the base on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.bank.bank import Bank
from inlay.data.encode import Choices, Encoder, Example
from inlay.data.table import Row
from inlay.errors import UsageError
from inlay.training.forward import Segment, scored
from inlay.training.memory import Room, within

from .metrics import Confusion, Tally

__all__ = ["HIGHER", "Judged", "evaluate", "judge", "metrics_of"]

Scores = dict[str, float]
HIGHER = ("accuracy", "f1", "exact_match")
"""Metrics of which more is better; of the others, less is."""


@dataclass
class Judged:
    """An adapter's metrics, and for labels the table of which was taken for which."""

    scores: Scores
    confusion: Confusion | None = None


def metrics_of(kind: str) -> tuple[str, ...]:
    """The metrics that rows of a kind are scored by, the usual one to choose the best adapter by first."""
    return ("loss", "accuracy", "f1") if kind == "label" else ("loss", "perplexity", "accuracy", "exact_match")


def evaluate(
    bank: Bank, encoder: Encoder, rows: Sequence[Row], adapters: Sequence[str | None], tokens_at_once: int = 4096,
    on_rows: Callable[[int], None] | None = None,
) -> dict[str | None, Scores]:  # fmt: skip
    """Metrics of each adapter (None is the plain base) on the same rows, in the same forwards; see `judge`."""
    judged = judge(bank, encoder, rows, adapters, Room(tokens_at_once), on_rows)
    return {adapter: found.scores for adapter, found in judged.items()}


@torch.no_grad()
def judge(
    bank: Bank, encoder: Encoder, rows: Sequence[Row], adapters: Sequence[str | None], room: Room,
    on_rows: Callable[[int], None] | None = None,
) -> dict[str | None, Judged]:  # fmt: skip
    """For labels: loss (nats, of the right label among the candidates), accuracy and macro F1, and the confusion table.
    Else: loss (nats a token), perplexity, accuracy of tokens, and the share of rows whose greedy answer is exact.

    `on_rows` hears how many rows are done. Where memory runs out, `room` is cut and the group done again.
    Raises: DataError naming a row that cannot be scored; UsageError where there are none.
    """
    if not rows:
        raise UsageError("there are no rows to score on", "Give a file with some, or hold out more.")
    bank.model.eval()
    labelled = encoder.template.kind == "label"
    items = [encoder.choices(row) for row in rows] if labelled else encoder.examples(rows).examples
    labels = list(encoder.template.verbalizer)
    tallies: dict[str | None, Tally] = {adapter: Tally(labels) for adapter in adapters}
    queue = list(items)
    while queue:
        done = within(room, "evaluation", lambda: _group(bank, queue, adapters, room))
        for adapter, results in done.items():
            tallies[adapter].add(results)
        count = len(next(iter(done.values())))
        del queue[:count]
        if on_rows is not None:
            on_rows(count)
    return {a: Judged(t.scores(labelled), t.confusion if labelled else None) for a, t in tallies.items()}


def _group(
    bank: Bank, queue: Sequence[Choices | Example], adapters: Sequence[str | None], room: Room
) -> dict[str | None, list[Result]]:
    """Results of the queue's first items, as many as there is room for, one list for each adapter."""
    items = _first(queue, room, len(adapters))
    segments = [Segment(adapter, e) for adapter in adapters for item in items for e in _examples(item)]
    room.largest = sum(len(s.example.ids) for s in segments), len(items)
    logits, labels, counts = scored(bank, segments)
    room.check()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    pieces = iter(zip(wide.split(counts), labels.split(counts), strict=True))
    return {adapter: [_result(item, pieces) for item in items] for adapter in adapters}


def _first(queue: Sequence[Choices | Example], room: Room, times: int) -> list[Choices | Example]:
    taken: list[Choices | Example] = []
    left = room.tokens
    for item in queue:
        left -= times * sum(len(example.ids) for example in _examples(item))
        if taken and left < 0:
            break
        taken.append(item)
    return taken


@dataclass
class Result:
    """Of a labelled row the right `label` and `log_probabilities` of all; else losses and hits of its tokens."""

    label: str = ""
    log_probabilities: dict[str, float] = field(default_factory=dict)
    nats: float = 0.0
    tokens: int = 0
    hits: int = 0


def _result(item: Choices | Example, pieces: Iterator[tuple[Tensor, Tensor]]) -> Result:
    if isinstance(item, Example):
        logits, labels = next(pieces)
        nats = float(F.cross_entropy(logits, labels, reduction="sum"))
        return Result(nats=nats, tokens=len(labels), hits=int((logits.argmax(-1) == labels).sum()))
    words: dict[str, list[float]] = {}
    for (label, _), score in zip(item.words, _likelihoods(item, pieces), strict=True):
        words.setdefault(label, []).append(score)
    scores = torch.tensor([float(torch.tensor(own, dtype=torch.float64).logsumexp(0)) for own in words.values()])
    return Result(item.label, dict(zip(words, scores.log_softmax(0).tolist(), strict=True)))


def _likelihoods(choice: Choices, pieces: Iterator[tuple[Tensor, Tensor]]) -> list[float]:
    """The log-probability of each word; `pieces` yields logits and tokens, segment by segment."""
    if _single(choice):
        row = next(pieces)[0][0].log_softmax(-1)
        return [float(row[ids[0]]) for _, ids in choice.words]
    found = [next(pieces) for _ in choice.words]
    return [float(rows.log_softmax(-1).gather(1, ids[:, None]).sum()) for rows, ids in found]


def _single(choice: Choices) -> bool:
    """Whether every word is one token, so that one run of the prompt scores them all."""
    return all(len(ids) == 1 for _, ids in choice.words)


def _examples(item: Choices | Example) -> list[Example]:
    """What is run for an item: itself, or its prompt with each word, of which only the word is scored."""
    if isinstance(item, Example):
        return [item]
    head, place = len(item.prompt), getattr(item, "place", 0)
    words = item.words[:1] if _single(item) else item.words
    return [
        Example((*item.prompt, *ids), (False,) * head + (True,) * len(ids), item.sample, place=place)
        for _, ids in words
    ]  # fmt: skip
