"""What stands before every request: its host and origin, its size, its key and the key's rate, and a line of log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

from .keys import EVERYBODY, Key, Keys, Rates
from .limits import Limits
from .page import PATHS as PAGE
from .problems import Problem, problem_of, too_many

__all__ = ["LOCAL", "OPEN", "Guard", "key_of", "user_of"]

LOCAL = ("127.0.0.1", "localhost", "::1")
"""This machine's own names for itself."""
OPEN = ("/healthz", "/readyz", *PAGE)
"""What answers without a key."""
FREE = (*OPEN, "/metrics")
"""What is answered however many requests are open."""

log = logging.getLogger("inlay.serve")


class Guard:
    """An ASGI application around `app`.

    A host that is none of `hosts` is refused (a page elsewhere could point a name of its own here), and so is a page of
    another origin. `keys` None lets everybody ask. What `app` does not catch becomes a 500, and a line of log.
    """

    def __init__(self, app: Any, limits: Limits, keys: Keys | None, hosts: Collection[str]) -> None:
        self.app, self.limits, self.keys, self.hosts = app, limits, keys, frozenset(h.lower() for h in hosts)
        self.rates = Rates()
        self.open: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in scope["headers"]}
        answer = _Answer(send)
        began = time.monotonic()
        key = None
        try:
            self._check_place(headers)
            key = scope["inlay.key"] = self._key(scope["path"], headers)
            self._check_length(headers)
            with self._counted(scope["path"], key):
                await self.app(scope, _Body(receive, self.limits), answer)
        except Exception as error:  # nothing that goes wrong in one request may end the server, or reach the client
            await self._failed(error, scope, receive, answer)
        finally:
            said = f"{scope['method']} {scope['path']} {answer.status or 'left'} {time.monotonic() - began:.3f} s"
            who = f" by {key.name}" if key is not None and key.name else ""
            log.info("%s%s%s", said.encode("ascii", "backslashreplace").decode(), who, scope.get("inlay.note", ""))

    # ---- checks

    def _check_place(self, headers: dict[str, str]) -> None:
        host = _name(headers.get("host", ""))
        if host not in self.hosts:
            raise Problem(403, f"this server is not called {host!r}; start it with --allow-host {host}", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and _name(origin.partition("://")[2]) not in self.hosts:
            raise Problem(403, "pages of other sites may not ask this server", "wrong_origin")

    def _key(self, path: str, headers: dict[str, str]) -> Key:
        if self.keys is None or path in OPEN:
            return EVERYBODY if self.keys is None else Key("")
        kind, _, given = headers.get("authorization", "").partition(" ")
        found = self.keys.find(given.strip()) if kind.lower() == "bearer" and given.strip() else None
        if found is None:
            said = "the API key is not known" if given else "this server needs an API key: Authorization: Bearer KEY"
            raise Problem(401, said, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if wait := self.rates.wait(found):
            raise too_many(f"the key {found.name!r} has used up its rate of {found.rate}", wait)
        return found

    def _check_length(self, headers: dict[str, str]) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.limits.max_body:
            raise _too_large(self.limits)

    def _counted(self, path: str, key: Key) -> _Counted:
        """Raises: Problem where too many requests are open."""
        if path not in FREE:
            if self.open.total() >= self.limits.max_open:
                raise too_many(f"{self.limits.max_open} requests are open", 1)
            if key.name and self.open[key.name] >= self.limits.max_open_per_key:
                raise too_many(f"the key {key.name!r} has {self.open[key.name]} open requests", 1)
        return _Counted(self.open, key.name if path not in FREE else None)

    async def _failed(self, error: Exception, scope: Any, receive: Any, answer: _Answer) -> None:
        problem = problem_of(error)
        if problem.status == 500:
            log.error("%s %s failed", scope["method"], scope["path"].encode("ascii", "replace"), exc_info=error)
        if answer.status is None:
            await problem.answer()(scope, receive, answer)


def key_of(request: Any) -> Key:
    """Who asks."""
    return request.scope["inlay.key"]


def user_of(request: Any, body: Any = None) -> str | None:
    """For whom: the body's `user` or `safety_identifier`, else the header X-Session; None where nobody is named."""
    named = getattr(body, "user", None) or getattr(body, "safety_identifier", None)
    return named or request.headers.get("x-session") or None


class _Counted:
    def __init__(self, open: Counter[str], name: str | None) -> None:
        self.open, self.name = open, name

    def __enter__(self) -> None:
        if self.name is not None:
            self.open[self.name] += 1

    def __exit__(self, *gone: object) -> None:
        if self.name is not None:
            self.open[self.name] -= 1
            self.open += Counter()  # names that have nothing open are forgotten


class _Answer:
    """`send`, remembering the status that has been sent."""

    def __init__(self, send: Any) -> None:
        self.send = send
        self.status: int | None = None

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.send(message)


class _Body:
    """`receive` of a body that comes in time and is not too large."""

    def __init__(self, receive: Any, limits: Limits) -> None:
        self.receive, self.limits = receive, limits
        self.size, self.whole = 0, False

    async def __call__(self) -> Any:
        if self.whole:  # what comes now says that the client has gone
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), self.limits.slow)
        except TimeoutError:
            raise Problem(408, f"nothing came for {self.limits.slow:g} seconds", "timeout") from None
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
            if self.size > self.limits.max_body:
                raise _too_large(self.limits)
        return message


def _too_large(limits: Limits) -> Problem:
    return Problem(413, f"the body has more than {limits.max_body} bytes", "body_too_large")


def _name(host: str) -> str:
    """A host's name without its port: [::1]:8000 is ::1."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host
