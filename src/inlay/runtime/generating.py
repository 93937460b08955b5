"""Answers to many requests at once, each with its own adapters and settings, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from inlay.bank.bank import Bank
from inlay.batch.past import BLOCK
from inlay.batch.route import normalise

from .decode import CHUNK, STORE, Decoder
from .drawing import Drawing, TokenLogprobs, drawings, sample
from .padded_writing import padded_tokens
from .requests import Request, Token, end_tokens, vocabulary_of
from .running import Running
from .stops import Answer, Detokenizer
from .token_bytes import token_bytes

__all__ = ["Session", "generate"]


@dataclass(eq=False)
class _Writing:
    """One answer in flight; the first of its request has the others `behind` it until its prompt is read."""

    number: int
    row: Running
    drawing: Drawing
    answer: Answer
    behind: list[tuple[Drawing, Answer]] = field(default_factory=list)


class Session:
    """Requests that come and go over one bank, whose base keeps packed segments apart.

    Without a `tokenizer` answers have ids alone. `store`, `chunk` and `most` are as in `Decoder`.
    """

    def __init__(
        self, bank: Bank, tokenizer: Any = None, store: int = STORE, chunk: int = CHUNK, most: int = 256
    ) -> None:  # fmt: skip
        self.bank, self.decoder = bank, Decoder(bank, store, chunk, most)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._eos, self._vocabulary = end_tokens(bank.model), vocabulary_of(bank.model)
        self._writing: dict[Running, _Writing] = {}

    @property
    def busy(self) -> bool:
        return bool(self._writing)

    def add(self, number: int, request: Request) -> None:
        """Take a request; its tokens will have its `number`. Raises: UsageError where it cannot be answered."""
        made = drawings(request.sampling, request.ids, self._eos, self._vocabulary, request.name)
        answers = [Answer(request.sampling, self._eos, self._detokenizer) for _ in made]
        new = request.sampling.max_new_tokens
        row = self.decoder.add(request.route, request.ids, new, request.place, request.scope)
        rest = list(zip(made[1:], answers[1:], strict=True))
        self._writing[row] = _Writing(number, row, made[0], answers[0], rest)

    def cancel(self, number: int) -> None:
        """Leave all answers of a request where they are."""
        for row, writing in list(self._writing.items()):
            if writing.number == number:
                self._end(row)

    def close(self) -> None:
        """Leave all answers where they are."""
        for row in list(self._writing):
            self._end(row)

    def step(self) -> list[Token]:
        """One token of each answer that can have one now."""
        rows, logits = self.decoder.step()
        if logits is None:
            return []
        writing, at = [], []
        for place, row in enumerate(rows):
            for one in self._answers(self._writing[row]):
                writing.append(one)
                at.append(place)
        drawn = sample(logits if len(at) == len(logits) else _repeated(logits, at), [one.drawing for one in writing])
        found = []
        for place, one in enumerate(writing):
            if place in drawn.errors:
                error = drawn.errors[place]
                found.append(Token(one.number, one.drawing.answer, -1, one.answer.finish(), None, "error", error))
                self._end(one.row)
                continue
            found.append(self._written(one, drawn.tokens[place], drawn.logprobs[place]))
        return found

    def _answers(self, first: _Writing) -> list[_Writing]:
        """The answers of a row whose prompt has just been read; itself alone later on."""
        made = [first]
        for drawing, answer in first.behind:
            row = self.decoder.fork(first.row)
            self._writing[row] = _Writing(first.number, row, drawing, answer)
            made.append(self._writing[row])
        first.behind = []
        return made

    def _written(self, one: _Writing, token: int, logprobs: TokenLogprobs | None) -> Token:
        text = one.answer.push(token)
        reason = one.answer.finish_reason
        if reason is None:
            self.decoder.write(one.row, token)
        else:
            self._end(one.row)
        return Token(one.number, one.drawing.answer, token, text, logprobs, reason, None, one.row.cached)

    def _end(self, row: Running) -> None:
        del self._writing[row]
        self.decoder.end(row)


def generate(
    bank: Bank, requests: Sequence[Request], tokenizer: Any = None, store: int | None = None, most: int = 256,
    on_message: Callable[[str], None] = lambda line: None,
) -> Iterator[Token]:  # fmt: skip
    """The tokens of all requests, each as soon as it is there; `most` rows write at once, in `store` bytes (what they
    need, up to 1 GiB, where nobody says).

    A request's tokens depend on its own settings and seed, and on no neighbour. A base that cannot keep packed segments
    apart writes in padded rows, which `on_message` is told. Raises: UsageError where a request cannot be answered,
    before any of them is.
    """
    if not bank.packs:
        on_message("this base cannot keep packed segments apart: answers are written in padded rows")
        yield from padded_tokens(bank, requests, tokenizer, min(most, 32))
        return
    session = Session(bank, tokenizer, needed_bytes(bank, requests, most) if store is None else store, most=most)
    try:
        for number, request in enumerate(requests):
            session.add(number, request)
        while session.busy:
            yield from session.step()
    finally:
        session.close()


def needed_bytes(bank: Bank, requests: Sequence[Request], most: int) -> int:
    """What a store needs for the `most` largest of the requests, up to STORE; one row always fits."""
    sizes = sorted((_blocks(bank, request) for request in requests), reverse=True)
    whole = token_bytes(bank) * BLOCK
    return max(min(STORE, whole * sum(sizes[:most])), whole * max(sizes, default=1))


def _blocks(bank: Bank, request: Request) -> int:
    adapters = [bank.adapters[name] for name, _ in normalise(request.route, bank.adapters)]
    ahead = sum(adapter.prefix_length + adapter.virtual_length for adapter in adapters)
    one = -(-(ahead + len(request.ids) + request.sampling.max_new_tokens) // BLOCK)
    return one * request.sampling.n


def _repeated(logits: Tensor, at: list[int]) -> Tensor:
    return logits[at]
