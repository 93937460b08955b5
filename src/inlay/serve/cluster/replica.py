"""One server behind the front: a base with its own bank, store and engine, and the same endpoints as one alone."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ray import serve

from inlay.bases.quiet import hush
from inlay.errors import InlayError
from inlay.serve.http.problems import problem_of
from inlay.serve.refusals import UnknownAdapter

from .asked import BEGAN, BEHIND, CHANGED, LOAD, UNFIT, UNLOAD, Asked, Change

if TYPE_CHECKING:
    from inlay.serve.http.settings import ServeSettings

__all__ = ["Replica"]

LOOPBACK = "127.0.0.1:0"

log = logging.getLogger("inlay.serve")


class Replica:
    """What Ray Serve runs, once a replica. With `alone` nothing of it listens beyond this machine.

    Where the settings cannot be served it says so when it is asked, and is soon replaced: Ray would hand over no more
    of an error here than that there was one.
    """

    def __init__(self, settings: ServeSettings, alone: bool) -> None:
        hush()  # before what is imported here
        from inlay.serve.http.app import make_routes
        from inlay.serve.http.run import log_to_stderr, open_service

        os.dup2(2, 1)  # the front's standard output is its own
        if alone:
            _listen_here()
        log_to_stderr(settings.log_prompts)
        self.settings, self.version = settings, 0
        self.id = serve.get_replica_context().replica_id.unique_id
        self.refusal: InlayError | None = None
        self._looked = False
        try:
            self.service = open_service(settings)
        except InlayError as error:
            self.refusal = error
            return
        self.app = make_routes(self.service)
        self._stack, self._catching_up = ExitStack(), asyncio.Lock()
        self._stack.enter_context(self.service.running())

    def check_health(self) -> None:
        """Ray starts another replica where this raises; but none would ever be ready where the first look fails."""
        first, self._looked = not self._looked, True
        if self.refusal is not None:
            if not first:
                raise RuntimeError(str(self.refusal))
        elif not self.service.engine.alive:
            raise RuntimeError("the engine has stopped")

    async def __call__(self, asked: Asked) -> AsyncIterator[list[Any]]:
        """The ASGI messages of the answer to one request, as many at once as there are, behind one that says who has
        begun; or only one that says that changes are missing, or that nothing can be served here."""
        if self.refusal is not None:
            yield [{"type": UNFIT, "replica": self.id, "said": str(self.refusal)}]
            return
        if self.version < asked.version:
            if asked.changes is None:
                yield [{"type": BEHIND}]
                return
            await self.catch_up(asked.version, asked.changes)
        yield [{"type": BEGAN, "replica": self.id}]
        messages = _Messages(asked.body)
        work = asyncio.create_task(self._answer(asked, messages))
        try:
            async for some in messages:
                yield some
        finally:
            messages.gone.set()
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work

    async def whole(self, asked: Asked) -> dict[str, Any]:
        """The answer in one piece: the replica's id, the status and the body."""
        self._check()
        answer, body = {"replica": self.id, "status": 500}, b""
        async for messages in self(asked):
            for message in messages:
                answer["status"] = message.get("status", answer["status"])
                body += message.get("body", b"")
        return {**answer, "body": body}

    async def catch_up(self, version: int, changes: Sequence[Change]) -> None:
        """Do the changes that this replica has not done."""
        if self.refusal is not None:
            return
        async with self._catching_up:
            await asyncio.to_thread(self._do, [change for change in changes if change.number > self.version])
            self.version = max(self.version, version)

    def state(self) -> dict[str, Any]:
        """Who this is, and what it does."""
        self._check()
        stats = self.service.engine.stats()
        loaded = [info.name for info in self.service.adapters.known() if info.loaded]
        made = {"replica": self.id, "pid": os.getpid(), "running": stats.running, "waiting": stats.waiting}
        return made | {"loaded": loaded}

    def begin(self) -> dict[str, Any]:
        """Set the experiments of the settings' file. Returns what is served, and what is to be said; or a refusal."""
        if self.refusal is not None:
            kind, what, remedy = type(self.refusal).__name__, self.refusal.what, self.refusal.remedy
            return {"refused": (kind, what, remedy)}
        from inlay.serve.http.experiments import start

        said: list[str] = []
        start(self.service, self.settings.experiments, said.append)
        known = [info.name for info in self.service.adapters.known()]
        return {"base": self.service.base, "adapters": known, "said": said}

    def stop(self) -> None:
        """Take no more requests, and keep what experiments have seen."""
        self._check()
        self._stack.close()
        self.service.stop()

    def _check(self) -> None:
        if self.refusal is not None:
            raise RuntimeError(str(self.refusal))

    # ---- one request

    async def _answer(self, asked: Asked, messages: _Messages) -> None:
        """Let the application answer, and say what the request has changed."""
        scope = {**asked.scope, "asgi": {"version": "3.0"}, "inlay.key": asked.key}
        changes, before = asked.path in (LOAD, UNLOAD), self._path_of(asked)
        try:
            with messages.held(changes):
                await self.app(scope, messages.receive, messages.send)
                if changes and messages.status == 200:
                    path = self._path_of(asked) if asked.path == LOAD else before
                    if path is not None:
                        self.version = max(self.version, asked.version + 1)
                    messages.put({"type": CHANGED, "path": path, "served": asked.path == LOAD})
        except Exception as error:
            if messages.status is None:
                await problem_of(error).answer()(scope, messages.receive, messages.send)
            log.error("%s failed", asked.path.encode("ascii", "replace"), exc_info=error)
        finally:
            messages.put(None)

    def _path_of(self, asked: Asked) -> str | None:
        """The folder of the adapter that a request loads or unloads."""
        if asked.path not in (LOAD, UNLOAD) or asked.adapter is None:
            return None
        path = self.service.adapters.paths().get(asked.adapter)
        return None if path is None else str(path)

    def _do(self, changes: Sequence[Change]) -> None:
        for change in changes:
            try:
                if change.served:
                    self.service.adapters.place(change.name, change.path)
                    continue
            except (InlayError, OSError) as error:
                log.warning("adapter %r: %s", change.name, error)
            with suppress(UnknownAdapter):
                self.service.adapters.unload(change.name)


class _Messages:
    """What the application sends until it has ended, and what it gets: the body, and then that the client has gone."""

    def __init__(self, body: bytes) -> None:
        self.gone, self.status = asyncio.Event(), None
        self._body: bytes | None = body
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._held: list[Any] | None = None

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        if self._held is None:
            self.put(dict(message))
        else:
            self._held.append(dict(message))

    def put(self, message: dict[str, Any] | None) -> None:
        """Hand a message on; None is the end."""
        self._queue.put_nowait(message)

    @contextmanager
    def held(self, really: bool) -> Iterator[None]:
        """What is sent meanwhile comes behind what is put."""
        held = self._held = [] if really else None
        try:
            yield
        finally:
            self._held = None
            for message in held or ():
                self.put(message)

    async def __aiter__(self) -> AsyncIterator[list[Any]]:
        while True:
            some = [await self._queue.get()]
            while not self._queue.empty():
                some.append(self._queue.get_nowait())
            if found := [message for message in some if message is not None]:
                yield found
            if some[-1] is None:
                return


def _listen_here() -> None:
    """Ray Serve's own server of a replica listens on all addresses: let it take this machine's alone."""
    from ray.serve._private import replica

    bind: Any = getattr(replica, "add_port_to_grpc_server", None)
    if bind is not None:  # the front looks at what listens, and refuses where this was not enough
        setattr(replica, "add_port_to_grpc_server", lambda server, address: bind(server, LOOPBACK))  # noqa: B010
