"""Scores of adapters and the base on held-out rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.bank.bank import Bank
from inlay.data.encode import PIECE, Choices, Encoder, Example
from inlay.data.prepare import Examples, prepare
from inlay.data.rows import Row, as_rows
from inlay.errors import DataError, DroppedRow, UsageError
from inlay.runtime.forward import Segment, answer_logits
from inlay.runtime.memory import TokenBudget, with_backoff

from .compare import HIGHER
from .heads import head_rows
from .intervals import Interval, intervals
from .rows import Confusion, RowScores

__all__ = ["HIGHER", "Items", "NoneLeft", "Scored", "evaluate", "items_of", "metrics_of", "score", "score_rows"]

Scores = dict[str, float]
MANY = 10_000
"""Rows beyond which encoded ones are kept on disk."""
MOST = 1024
"""Items that are looked at for one forward."""


class NoneLeft(DataError):
    """No row is of use."""


@dataclass(frozen=True)
class Scored:
    """What one adapter scored on each row, and what follows from that."""

    rows: RowScores

    @cached_property
    def scores(self) -> Scores:
        """The metrics; see `score_rows`."""
        return self.rows.scores()

    @cached_property
    def intervals(self) -> dict[str, Interval | None]:
        """The metrics' 95 % intervals; None where there is none."""
        return intervals(self.rows)

    @property
    def confusion(self) -> Confusion | None:
        """For labels, the table of which was taken for which."""
        return self.rows.confusion


@dataclass(frozen=True)
class Items:
    """Rows made ready to be scored any number of times; `labels` are those of the verbalizer, none for other kinds;
    `task` is that of their template.

    `counts` holds their number as "rows", and those that cannot be scored by reason.
    """

    items: Sequence[Choices | Example]
    labels: tuple[str, ...]
    counts: Counter[str]
    task: str = "generate"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def samples(self) -> list[int]:
        """The number of the row that each item comes from."""
        samples = self.items.samples.tolist() if isinstance(self.items, Examples) else [i.sample for i in self.items]
        return [sample % (1 << PIECE) for sample in samples]

    def first(self, count: int) -> Items:
        return Items(self.items[:count], self.labels, self.counts, self.task)


METRICS = {
    "label": ("loss", "accuracy", "f1"),
    "number": ("loss", "mae", "pearson", "spearman"),
    "tags": ("loss", "accuracy", "span_f1"),
}


def metrics_of(kind: str) -> tuple[str, ...]:
    """The metrics that rows of a kind are scored by, the usual one to choose the best adapter by first."""
    return METRICS.get(kind, ("loss", "perplexity", "accuracy", "exact_match"))


def items_of(encoder: Encoder, rows: Sequence[Row]) -> Items:
    """Encode rows for scoring; those that are of no use are counted. Raises: DataError where none is left."""
    labels = tuple(encoder.template.verbalizer) if encoder.template.kind in ("label", "tags") else ()
    task = encoder.template.task
    if len(rows) > MANY and not labels and task == "generate":
        prepared = prepare(encoder, rows)
        return Items(prepared.examples, (), prepared.counts)
    counts, items = Counter(rows=len(rows)), list[Choices | Example]()
    scores_words = bool(labels) and task == "generate"
    for chunk in as_rows(rows).chunks():
        for found in encoder.all_choices(chunk) if scores_words else encoder.encode(chunk):
            if isinstance(found, DroppedRow):
                counts[f"dropped: {found.reason}"] += 1
            else:
                items += [found] if isinstance(found, Choices) else found
    if len(rows) and not items:
        why = "; ".join(f"{count} {reason}" for reason, count in counts.items() if reason != "rows")
        raise NoneLeft(f"none of {len(rows)} rows can be scored ({why})", "Raise --max-length, or check the columns.")
    return Items(items, labels, counts, task)


def evaluate(
    bank: Bank, encoder: Encoder, rows: Sequence[Row], adapters: Sequence[str | None], tokens_at_once: int = 4096,
    on_rows: Callable[[int], None] | None = None,
) -> dict[str | None, Scores]:  # fmt: skip
    """Metrics of each adapter (None is the plain base) on the same rows, in the same forwards; see `score_rows`."""
    scored = score_rows(bank, encoder, rows, adapters, TokenBudget(tokens_at_once), on_rows)
    return {adapter: found.scores for adapter, found in scored.items()}


def score_rows(
    bank: Bank, encoder: Encoder, rows: Sequence[Row], adapters: Sequence[str | None], budget: TokenBudget,
    on_rows: Callable[[int], None] | None = None,
) -> dict[str | None, Scored]:  # fmt: skip
    """For labels: loss (nats, of the right label among the candidates), accuracy and macro F1, and the confusion table.
    For numbers: loss (squared error), mean absolute error, Pearson's and Spearman's correlation. For tags: loss (nats a
    tag), accuracy of tags, F1 of spans. Else: loss (nats a token), perplexity, accuracy of tokens, and the share of
    rows whose greedy answer is exact.

    `on_rows` hears how many rows are done. Where memory runs out, `budget` is cut and the group done again.
    Raises: DataError naming a row that cannot be scored; UsageError where there are none.
    """
    return score(bank, items_of(encoder, rows), adapters, budget, on_rows)


@torch.no_grad()
def score(
    bank: Bank, items: Items, adapters: Sequence[str | None], budget: TokenBudget,
    on_rows: Callable[[int], None] | None = None,
) -> dict[str | None, Scored]:  # fmt: skip
    """As `score_rows`, for items that are encoded already."""
    if items.task != "generate" and len(items):
        made = head_rows(bank, items.task, items.labels, _examples_of(items), adapters, budget, on_rows)
        return {adapter: Scored(own) for adapter, own in made.items()}
    if not len(items):
        raise UsageError("there are no rows to score on", "Give a file with some, or hold out more.")
    bank.model.eval()
    found: dict[str | None, list[Result]] = {adapter: [] for adapter in adapters}
    done = 0
    while done < len(items):
        queue = items.items[done : done + MOST]
        results = with_backoff(budget, "evaluation", lambda queue=queue: _group(bank, queue, adapters, budget))
        for adapter, own in results.items():
            found[adapter] += own
        count = len(next(iter(results.values())))
        done += count
        if on_rows is not None:
            on_rows(count)
    samples = items.samples
    return {adapter: Scored(_rows(samples, results, items.labels)) for adapter, results in found.items()}


def _examples_of(items: Items) -> Sequence[Example]:
    return items.items if isinstance(items.items, Examples) else [i for i in items.items if isinstance(i, Example)]


def _rows(samples: Sequence[int], results: Sequence[Result], labels: Sequence[str]) -> RowScores:
    if not labels:
        sums = [(r.nats, r.tokens, r.hits) for r in results]
        return RowScores.of_tokens(samples, *zip(*sums, strict=True))
    right = [labels.index(result.label) for result in results]
    found = np.array([[r.log_probabilities[label] for label in labels] for r in results], np.float64)
    return RowScores.of_labels(samples, right, found, labels)


def _group(
    bank: Bank, queue: Sequence[Choices | Example], adapters: Sequence[str | None], budget: TokenBudget
) -> dict[str | None, list[Result]]:
    """Results of the queue's first items, as many as there is room for, one list for each adapter."""
    items = _first(queue, budget, len(adapters))
    segments = [Segment(adapter, e) for adapter in adapters for item in items for e in _examples(item)]
    budget.largest = sum(len(s.example.ids) for s in segments), len(items)
    logits, labels, counts = answer_logits(bank, segments)
    budget.check()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    pieces = iter(zip(wide.split(counts), labels.split(counts), strict=True))
    return {adapter: [_result(item, pieces) for item in items] for adapter in adapters}


def _first(queue: Sequence[Choices | Example], budget: TokenBudget, times: int) -> list[Choices | Example]:
    taken: list[Choices | Example] = []
    left = budget.tokens
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
    head, place = len(item.prompt), item.virtual_at
    words = item.words[:1] if _single(item) else item.words
    return [
        Example((*item.prompt, *ids), (False,) * head + (True,) * len(ids), item.sample, virtual_at=place)
        for _, ids in words
    ]  # fmt: skip
