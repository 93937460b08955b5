"""What is asked of the engine, and the answer as it comes: read in a thread, or in an asyncio task."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from inlay.errors import InlayError
from inlay.runtime.requests import Request, Token

__all__ = ["Ask", "Ticket", "deliver"]


@dataclass(frozen=True)
class Ask(Request):
    """A request whose route names adapters as users know them; `tenant` is whose turn it takes."""

    tenant: str = ""

    @property
    def cost(self) -> int:
        """Tokens that it may take: those of its prompt, and all that it may write."""
        return len(self.ids) + self.sampling.max_new_tokens * self.sampling.n


class Ticket:
    """The answers to one ask. One reader takes their tokens: `tokens()` in a thread, `async for` in a task.

    An answer ends with a token that has a `finish_reason`; "error" says why there. A reader that is slow costs the
    memory of `max_new_tokens` tokens for each of the `n` answers at most; one that has gone should `cancel`.
    `submitted`, `admitted`, `first` and `last` are the times (of `time.monotonic`) at which it was asked, began to be
    read, and had its first and its latest token. `made` counts tokens so far, `cached` those of the prompt that were
    read before.
    """

    def __init__(self, ask: Ask, on_cancel: Callable[[Ticket], None] = lambda ticket: None) -> None:
        self.ask, self.cancelled = ask, False
        self.submitted = time.monotonic()
        self.admitted: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self.made = self.cached = 0
        self._on_cancel = on_cancel
        self._going = set(range(ask.sampling.n))
        self._tokens: deque[Token] = deque()
        self._changed = threading.Condition()
        self._waker: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def done(self) -> bool:
        """Whether no more tokens come than those that wait to be read."""
        return self.cancelled or self.ended

    @property
    def ended(self) -> bool:
        """Whether all answers have come to their ends."""
        return not self._going

    # ---- reading

    def tokens(self) -> Iterator[Token]:
        """The tokens as they come; waits in this thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tokens or self.done)
                taken, over = self._take()
            yield from taken
            if over:
                return

    async def __aiter__(self) -> AsyncIterator[Token]:
        event = asyncio.Event()
        with self._changed:
            self._waker = asyncio.get_running_loop(), event
        while True:
            event.clear()
            with self._changed:
                taken, over = self._take()
            for token in taken:
                yield token
            if over:
                return
            if not taken:
                await event.wait()

    def cancel(self) -> None:
        """Leave all answers where they are; nothing more comes, and their rows are free."""
        with self._changed:
            if self.done:
                return
            self.cancelled = True
            self._tokens.clear()
            waker = self._notified()
        _wake([waker] if waker else [])
        self._on_cancel(self)

    def _take(self) -> tuple[list[Token], bool]:
        taken = list(self._tokens)
        self._tokens.clear()
        return taken, self.done

    # ---- writing, by the engine

    def put(self, token: Token) -> tuple[asyncio.AbstractEventLoop, asyncio.Event] | None:
        """Add a token; returns whom to wake."""
        with self._changed:
            if self.done or token.answer not in self._going:
                return None
            self.last = time.monotonic()
            self.first = self.first or self.last
            self.made += token.id >= 0
            self.cached = max(self.cached, token.cached)
            if token.finish_reason is not None:
                self._going.discard(token.answer)
            self._tokens.append(token)
            return self._notified()

    def fail(self, error: InlayError, number: int = 0) -> None:
        """End all answers that go on with an error."""
        going = sorted(self._going)
        deliver((self, Token(number, answer, -1, finish_reason="error", error=error)) for answer in going)

    def _notified(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Event] | None:
        self._changed.notify_all()
        return self._waker


def deliver(given: Iterable[tuple[Ticket, Token]]) -> None:
    """Put tokens into their tickets, and wake each event loop once."""
    _wake([waker for ticket, token in given if (waker := ticket.put(token)) is not None])


def _wake(wakers: Sequence[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for loop, event in wakers:
        loops.setdefault(loop, []).append(event)
    for loop, events in loops.items():
        try:
            loop.call_soon_threadsafe(_set_all, events)
        except RuntimeError:  # the loop is closed: nobody reads
            continue


def _set_all(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        event.set()
