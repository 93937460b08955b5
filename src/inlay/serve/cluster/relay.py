"""One replica's answer on its way to the client."""

from __future__ import annotations

import asyncio
from typing import Any

from inlay.serve.http.problems import Problem
from inlay.serve.http.streams import DONE, event

__all__ = ["Relay"]

HEADER = b"x-inlay-replica"
LOST = "the replica that wrote this answer has ended, and the rest is lost. Ask again."


class Relay:
    """Hands a stream on as it comes; what is no stream is kept until it is whole, so that it can still be asked for
    elsewhere. Who reads nothing for `slow` seconds is left: TimeoutError.
    """

    def __init__(self, send: Any, slow: float) -> None:
        self.send, self.slow = send, slow
        self.replica = ""
        self.changed: dict[str, Any] | None = None
        self.begun = self.ended = False
        self._held: list[Any] = []
        self._streams = False

    def again(self) -> None:
        """Forget what was kept: another replica begins anew."""
        self._held, self._streams, self.changed, self.replica = [], False, None, ""

    async def take(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
            self._streams = any(name.lower() == b"content-type" and b"event-stream" in value for name, value in headers)
            message = {**message, "headers": [*headers, (HEADER, self.replica.encode())]}
        self._held.append(message)
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if self._streams or last:
            held, self._held = self._held, []
            for one in held:
                await self._sent(one)
            self.ended = last

    async def cut(self) -> None:
        """End a stream that has begun, where its replica has ended."""
        error = Problem(503, LOST, "replica_lost").body()
        await self._sent({"type": "http.response.body", "body": event(error) + DONE, "more_body": False})
        self.ended = True

    async def _sent(self, message: Any) -> None:
        self.begun = True
        async with asyncio.timeout(self.slow):
            await self.send(message)
