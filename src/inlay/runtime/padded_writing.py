"""Answers of bases that cannot keep packed segments apart: padded rows, through transformers' own `generate`."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from inlay.bank.bank import Bank
from inlay.batch.route import normalise
from inlay.errors import UsageError

from .drawing import Drawing, drawings, sample
from .requests import Request, Token, end_tokens, vocabulary_of
from .stops import Answer, Detokenizer

__all__ = ["padded_tokens"]


@dataclass(eq=False)
class _Row:
    """One answer of one request."""

    number: int
    request: Request
    drawing: Drawing
    answer: Answer
    over: bool = False


def padded_tokens(bank: Bank, requests: Sequence[Request], tokenizer: Any = None, most: int = 32) -> Iterator[Token]:
    """The tokens of requests, at most `most` answers at once; see `inlay.runtime.generating.generate`. Prompts of one
    length share a batch where the base does not ignore padding. Raises: UsageError."""
    detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
    eos, vocabulary = end_tokens(bank.model), vocabulary_of(bank.model)
    rows = []
    for number, request in enumerate(requests):
        if not request.ids:
            raise UsageError("the prompt has no tokens", "Give some words.")
        for drawing in drawings(request.sampling, request.ids, eos, vocabulary, request.name):
            rows.append(_Row(number, request, drawing, Answer(request.sampling, eos, detokenizer)))
    for batch in _batches(bank, rows, most):
        yield from _written(bank, batch)


def _batches(bank: Bank, rows: Sequence[_Row], most: int) -> Iterator[list[_Row]]:
    """Rows that may share a batch."""

    def kind(row: _Row) -> tuple[int, ...]:
        blend = normalise(row.request.route, bank.adapters)
        ahead = [bank.adapters[name] for name, _ in blend]
        virtual, prefix = sum(a.virtual_length for a in ahead), sum(a.prefix_length for a in ahead)
        return (0 if pads else len(row.request.ids), virtual, prefix)

    pads = bank.ignores_padding
    for _, alike in groupby(sorted(rows, key=kind), kind):
        own = list(alike)
        yield from (own[start : start + most] for start in range(0, len(own), most))


def _written(bank: Bank, rows: list[_Row]) -> Iterator[Token]:
    """The tokens of one batch; `generate` runs in a thread of its own, in this context."""
    tokens: Queue[Token | BaseException | None] = Queue()
    left = threading.Event()

    def run() -> None:
        try:
            _generate(bank, rows, tokens, left)
            tokens.put(None)
        except BaseException as error:
            tokens.put(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        while (found := tokens.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        left.set()
        thread.join()


def _generate(bank: Bank, rows: list[_Row], tokens: Queue[Any], left: threading.Event) -> None:
    model: Any = bank.model
    pad = getattr(model.generation_config, "pad_token_id", None) or 0
    new = max(row.request.sampling.max_new_tokens for row in rows)
    longest = max(len(row.request.ids) for row in rows)
    padded = [[pad] * (longest - len(row.request.ids)) + list(row.request.ids) for row in rows]
    mask = [[0] * (longest - len(row.request.ids)) + [1] * len(row.request.ids) for row in rows]
    given = torch.tensor(padded, device=model.device)
    places = [row.request.place for row in rows]
    with torch.no_grad(), bank.route([row.request.route for row in rows], places=places):
        model.generate(
            input_ids=given, attention_mask=torch.tensor(mask, device=model.device), max_new_tokens=new, min_length=0,
            do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=pad,
            logits_processor=[lambda ids, scores: _chosen(rows, scores, tokens, pad)],
            stopping_criteria=[lambda ids, scores, **more: _over(rows, ids, left)],
        )  # fmt: skip


def _chosen(rows: list[_Row], scores: Tensor, tokens: Queue[Any], pad: int) -> Tensor:
    """Scores (rows, vocabulary) that leave each row one token."""
    alive = [place for place, row in enumerate(rows) if not row.over]
    drawn = sample(scores[alive], [rows[place].drawing for place in alive])
    forced = torch.full_like(scores, -torch.inf)
    forced[:, pad] = 0
    for at, place in enumerate(alive):
        row = rows[place]
        if at in drawn.errors:
            row.over = True
            text = row.answer.finish()
            tokens.put(Token(row.number, row.drawing.answer, -1, text, None, "error", drawn.errors[at]))
            continue
        token = drawn.tokens[at]
        text = row.answer.push(token)
        row.over = row.answer.finish_reason is not None
        forced[place, pad], forced[place, token] = -torch.inf, 0
        tokens.put(Token(row.number, row.drawing.answer, token, text, drawn.logprobs[at], row.answer.finish_reason))
    return forced


def _over(rows: list[_Row], ids: Tensor, left: threading.Event) -> Tensor:
    return torch.tensor([left.is_set() or row.over for row in rows], device=ids.device)
