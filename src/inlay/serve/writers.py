"""How requests become tokens: rows of a stream that come and go, or batches of padded rows one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from inlay.bank.bank import Bank
from inlay.bases.heads import can_write
from inlay.batch.past import BLOCK
from inlay.errors import InlayError
from inlay.runtime.decode import CHUNK
from inlay.runtime.forward import check_trainable
from inlay.runtime.generating import Session, generate
from inlay.runtime.padded_writing import padded_tokens
from inlay.runtime.requests import Request, Token
from inlay.runtime.sampling import Sampling

__all__ = ["PackedWriter", "PaddedWriter", "Writer", "check_writes", "writer_for"]

PADDED = 32
"""Answers of one padded batch."""


class Writer(Protocol):
    """Requests in flight, by their numbers."""

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        ...

    def room(self, prompt: int, answers: int) -> bool:
        """Whether a request of so many tokens and answers could begin now."""
        ...

    def add(self, number: int, request: Request) -> None:
        """Begin a request. Raises: UsageError where it cannot be answered."""
        ...

    def cancel(self, number: int) -> None:
        """Leave a request; nothing where it has ended."""
        ...

    def step(self, wanted: Callable[[int], bool]) -> Iterator[list[Token]]:
        """The next tokens, those of one moment together; `wanted` says which requests anybody waits for still."""
        ...

    def reset(self) -> None:
        """Leave everything, after an error."""
        ...

    def forget(self) -> None:
        """Adapters have left the bank."""
        ...

    def blocks(self) -> tuple[int, int]:
        """Blocks of the key-value store that are in use, and all."""
        ...

    @property
    def sent_back(self) -> int:
        """How often a row had to make room."""
        ...


class PackedWriter:
    """Rows of one stream; `store` bytes hold their keys and values, and `most` answers are written at once."""

    def __init__(self, bank: Bank, tokenizer: Any, store: int, most: int) -> None:
        self._new = lambda: Session(bank, tokenizer, store, CHUNK, most)
        self._session, self.most, self._before = self._new(), most, 0
        self._answers: dict[int, int] = {}

    @property
    def busy(self) -> bool:
        return self._session.busy

    def room(self, prompt: int, answers: int) -> bool:
        """What has begun goes first: a row waits here until all before it have been read, so that none of them has to
        make room for it at once."""
        decoder = self._session.decoder
        if not self._session.busy:
            return True
        unread = sum(row.unread for row in (*decoder.rows, *decoder.waiting) if row.unread > 1 or not row.past.own)
        if sum(self._answers.values()) + answers > self.most or unread >= decoder.chunk:
            return False
        pages = decoder.store.pages
        promised = sum(_blocks(len(row.ids)) for row in decoder.waiting)
        return promised + _blocks(prompt) + pages.blocks // 50 <= pages.free

    def add(self, number: int, request: Request) -> None:
        self._session.add(number, self._fitting(request))
        self._answers[number] = request.sampling.n

    def _fitting(self, request: Request) -> Request:
        """A request that the base has positions for but for its adapters, which nobody had to know, writes fewer."""
        decoder, sampling, prompt = self._session.decoder, request.sampling, len(request.ids)
        if decoder.positions is None or prompt + sampling.max_new_tokens > decoder.positions:
            return request
        new = decoder.positions - prompt - decoder.bank.taken_by(request.route)
        if not 0 < new < sampling.max_new_tokens:
            return request
        least = min(new, sampling.min_new_tokens)
        return replace(request, sampling=replace(sampling, max_new_tokens=new, min_new_tokens=least))

    def cancel(self, number: int) -> None:
        self._session.cancel(number)
        self._answers.pop(number, None)

    def step(self, wanted: Callable[[int], bool]) -> Iterator[list[Token]]:
        found = self._session.step()
        for token in found:
            if token.finish_reason is not None:
                self._answers[token.request] -= 1
        self._answers = {number: left for number, left in self._answers.items() if left}
        yield found

    def reset(self) -> None:
        """A store whose rows were left inside of a step is not gone on with."""
        self._before += self._session.decoder.sent_back
        self._session.close()
        self._session, self._answers = self._new(), {}

    def forget(self) -> None:
        self._session.decoder.forget()

    def blocks(self) -> tuple[int, int]:
        pages = self._session.decoder.store.pages
        return pages.blocks - pages.free, pages.blocks

    @property
    def sent_back(self) -> int:
        return self._before + self._session.decoder.sent_back


class PaddedWriter:
    """Batches of `most` answers, each of which ends before the next begins."""

    def __init__(self, bank: Bank, tokenizer: Any, most: int) -> None:
        self.bank, self.tokenizer, self.most = bank, tokenizer, min(most, PADDED)
        self._waiting: dict[int, Request] = {}
        self.sent_back = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def room(self, prompt: int, answers: int) -> bool:
        return not self._waiting or sum(r.sampling.n for r in self._waiting.values()) + answers <= self.most

    def add(self, number: int, request: Request) -> None:
        self._waiting[number] = request

    def cancel(self, number: int) -> None:
        self._waiting.pop(number, None)

    def step(self, wanted: Callable[[int], bool]) -> Iterator[list[Token]]:
        numbers, requests = list(self._waiting), list(self._waiting.values())
        self._waiting = {}
        tokens = padded_tokens(self.bank, requests, self.tokenizer, self.most)
        try:
            for token in tokens:
                yield [replace(token, request=numbers[token.request])]
                if not any(map(wanted, numbers)):
                    return
        finally:
            tokens.close()  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self) -> None:
        self._waiting = {}

    def forget(self) -> None:
        pass

    def blocks(self) -> tuple[int, int]:
        return 0, 0


def writer_for(bank: Bank, tokenizer: Any, store: int, most: int) -> Writer:
    """Raises: UsageError where the store is too small."""
    if bank.packs and can_write(bank.model):
        return PackedWriter(bank, tokenizer, store, most)
    return PaddedWriter(bank, tokenizer, most)


def check_writes(bank: Bank, name: str) -> None:
    """Let an adapter read two tokens and write two. Raises: whatever its rows would; UsageError where the base writes
    no text; InlayError where its logits are no numbers."""
    check_trainable(bank)
    tokens = Request(name, [1, 1], Sampling(max_new_tokens=2, ignore_eos=True), name=f"adapter {name!r}")
    for token in generate(bank, [tokens]):
        if token.error is not None:
            raise InlayError(token.error.what, token.error.remedy)


def _blocks(tokens: int) -> int:
    """What a row needs that has read so many tokens, and writes one."""
    return -(-(tokens + 1) // BLOCK)
