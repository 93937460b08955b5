"""Server-sent events, and clients that go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, TypeVar

from .problems import dumped

__all__ = ["DONE", "Gone", "event", "unless_gone"]

DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class Gone(Exception):
    """The client has gone."""


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumped(value) + b"\n\n"


async def unless_gone(receive: Any, work: Awaitable[T]) -> T:
    """What `work` gives, unless the client goes before. Raises: Gone."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Gone
        return doing.result()
    finally:
        for task in (doing, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
