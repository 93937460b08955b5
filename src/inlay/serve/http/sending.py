"""Answers to clients that may vanish or stop reading: their rows are freed at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response

from .answers import Shape
from .problems import Json, Problem
from .service import Work
from .streams import DONE, Gone, event, unless_gone

__all__ = ["Events", "answered"]

HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def answered(request: Any, work: Work, shape: Shape) -> Any:
    """All answers in one piece. Raises: Problem."""
    outcome = "left"
    try:
        answers = await unless_gone(request.receive, work.whole())
        outcome = "done"
        return Json(shape.whole(answers, work.usage()), headers=shape.head.headers())
    except Gone:
        return Json(None, 499)  # nobody reads it
    except Problem:
        outcome = "failed"
        raise
    finally:
        work.end(outcome)


class Events(Response):
    """An ASGI answer: the pieces of a stream as server-sent events.

    The first token is waited for before anything is sent, so that what fails by then has a status of its own. What
    fails later is an event with OpenAI's error. Who reads nothing for `slow` seconds is left.
    """

    def __init__(self, work: Work, shape: Shape, usage: bool, slow: float) -> None:
        super().__init__()
        self.work, self.shape, self.usage, self.slow = work, shape, usage, slow

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        outcome = "left"
        pieces = self._pieces()
        try:
            first = await unless_gone(receive, _next(pieces))
            own = [(name.encode(), value.encode()) for name, value in self.shape.head.headers().items()]
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS + own})
            outcome = await unless_gone(receive, self._sent(first, pieces, send))
        except (Gone, OSError, TimeoutError):
            scope["inlay.note"] = " (the client has gone, or reads too slowly)"
        except Problem:
            outcome = "failed"
            raise
        finally:
            await pieces.aclose()
            self.work.end(outcome)

    async def _sent(self, first: bytes, pieces: AsyncIterator[bytes], send: Any) -> str:
        """Send all pieces; returns how it ended."""
        outcome = "done"
        await self._send(first, send)
        try:
            async for piece in pieces:
                await self._send(piece, send)
        except Problem as problem:
            outcome = "failed"
            await self._send(event(problem.body()), send)
        await self._send(DONE, send)
        await self._send(b"", send, False)
        return outcome

    async def _send(self, body: bytes, send: Any, more: bool = True) -> None:
        async with asyncio.timeout(self.slow):
            await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        begun = False
        async for answer, token in self.work.tokens():
            made = [] if begun else [one for own in self.work.answers.values() for one in self.shape.opened(own)]
            begun = True
            made += self.shape.piece(answer, token)
            if made:
                yield b"".join(map(event, made))
        if self.usage:
            yield event(self.shape.closing(self.work.usage()))


async def _next(pieces: AsyncIterator[bytes]) -> bytes:
    return await anext(pieces, b"")
