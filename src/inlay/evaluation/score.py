"""Scores of adapters and the base on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from inlay.bank.bank import Bank
from inlay.data.encode import Choices, Encoder, Example
from inlay.data.table import Row
from inlay.stream.route import RowSpec
from inlay.training.forward import Segment, batches, scored, token_losses

__all__ = ["evaluate"]

Scores = dict[str, float]


@torch.no_grad()
def evaluate(
    bank: Bank,
    encoder: Encoder,
    rows: Sequence[Row],
    adapters: Sequence[str | None],
    tokens_at_once: int = 4096,
    on_rows: Callable[[int], None] | None = None,
) -> dict[str | None, Scores]:
    """Metrics of each adapter (None is the plain base): accuracy for labels; loss (nats a token) and perplexity else.

    `on_rows` hears how many rows are done. Raises: DataError naming a row that cannot be scored.
    """
    if encoder.template.kind == "label":
        return _accuracies(bank, [encoder.choices(row) for row in rows], adapters, tokens_at_once, on_rows)
    examples = encoder.examples(rows).examples
    totals: dict[str | None, list[float]] = {adapter: [0.0, 0.0] for adapter in adapters}
    for batch in batches([Segment(None, example) for example in examples], max(1, tokens_at_once // len(adapters))):
        segments = [Segment(adapter, s.example) for adapter in adapters for s in batch]
        for segment, losses in zip(segments, token_losses(bank, segments), strict=True):
            total = totals[_name(segment.route)]
            total[0] += float(losses.sum())
            total[1] += len(losses)
        if on_rows is not None:
            on_rows(len(batch))
    means = {adapter: nats / max(count, 1) for adapter, (nats, count) in totals.items()}
    return {adapter: {"loss": mean, "perplexity": math.exp(min(mean, 700))} for adapter, mean in means.items()}


def _accuracies(
    bank: Bank,
    choices: list[Choices],
    adapters: Sequence[str | None],
    tokens_at_once: int,
    on_rows: Callable[[int], None] | None,
) -> dict[str | None, Scores]:
    right: dict[str | None, int] = dict.fromkeys(adapters, 0)
    budget = max(1, tokens_at_once // len(adapters))
    for group in _grouped(choices, budget):
        segments = [
            Segment(adapter, example) for adapter in adapters for choice in group for example in _candidates(choice)
        ]
        logits, labels, counts = scored(bank, segments)
        logs = iter(zip(logits.float().log_softmax(-1).split(counts), labels.split(counts), strict=True))
        for adapter in adapters:
            for choice in group:
                right[adapter] += _best(choice, _likelihoods(choice, logs)) == choice.label
        if on_rows is not None:
            on_rows(len(group))
    return {adapter: {"accuracy": count / len(choices)} for adapter, count in right.items()}


def _likelihoods(choice: Choices, logs: Iterator[tuple[Tensor, Tensor]]) -> list[float]:
    """The log-probability of each word; `logs` yields those of all tokens, and the tokens, segment by segment."""
    if _single(choice):
        row = next(logs)[0][0]
        return [float(row[ids[0]]) for _, ids in choice.words]
    pieces = [next(logs) for _ in choice.words]
    return [float(rows.gather(1, ids[:, None]).sum()) for rows, ids in pieces]


def _single(choice: Choices) -> bool:
    """Whether every word is one token, so that one run of the prompt scores them all."""
    return all(len(ids) == 1 for _, ids in choice.words)


def _candidates(choice: Choices) -> list[Example]:
    """The prompt with each word, of which only the word is scored."""
    head = len(choice.prompt)
    if _single(choice):
        return [Example((*choice.prompt, *choice.words[0][1]), (False,) * head + (True,), choice.sample)]
    return [
        Example((*choice.prompt, *ids), (False,) * head + (True,) * len(ids), choice.sample)
        for _, ids in choice.words
    ]  # fmt: skip


def _grouped(choices: list[Choices], budget: int) -> list[list[Choices]]:
    groups: list[list[Choices]] = []
    room = 0
    for choice in choices:
        size = sum(len(example.ids) for example in _candidates(choice))
        if not groups or size > room:
            groups.append([])
            room = budget
        groups[-1].append(choice)
        room -= size
    return groups


def _best(choice: Choices, scores: list[float]) -> str:
    """The label whose words have together the largest probability."""
    labels: dict[str, list[float]] = {}
    for (label, _), score in zip(choice.words, scores, strict=True):
        labels.setdefault(label, []).append(score)
    return max(labels, key=lambda label: float(torch.tensor(labels[label]).logsumexp(0)))


def _name(route: RowSpec) -> str | None:
    return route if isinstance(route, str) else None
