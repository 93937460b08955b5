"""The front of several servers: takes requests as one server does, and has replicas answer them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import RayServeException

from inlay.serve.http.guard import OPEN
from inlay.serve.http.limits import Limits
from inlay.serve.http.problems import Json, Problem
from inlay.serve.http.streams import Gone, unless_gone

from .asked import BEGAN, BEHIND, CHANGED, LOAD, UNFIT, UNLOAD, Asked, Changes
from .merged import merged_adapters, merged_metrics
from .relay import Relay

__all__ = ["Front"]

log = logging.getLogger("inlay.serve")


class Unfit(Exception):
    """A replica can serve nothing."""


LOST = (RayActorError, WorkerCrashedError, ObjectLostError, Unfit)
TRIES = 3
"""How many replicas a request may lose: one that ends whoever reads it must not end them all."""
WAIT = 60.0
"""Seconds that a request waits for a replica to begin."""
ALL = 20.0
"""Seconds that all replicas have to answer together."""
FIELDS = {
    "/v1/completions": "model", "/v1/chat/completions": "model", "/v1/classify": "model", LOAD: "lora_name",
    UNLOAD: "lora_name",
}  # fmt: skip
"""The field of a body that a request is routed by."""
SCOPE = ("type", "http_version", "method", "path", "raw_path", "query_string", "headers", "scheme", "client", "server")
"""What of ASGI's scope a replica gets."""
SECRETS = (b"authorization", b"proxy-authorization", b"cookie")
FEEDBACK = "/v1/feedback"


class Front:
    """An ASGI application over a Ray Serve `handle` of replicas, behind a `Guard`. `base` is the base's name; `close`
    is called when the server has stopped.

    A request whose replica ends goes to another one, unless words of it have been sent, or it deletes or counts
    something: then the client is told.
    """

    def __init__(self, handle: Any, limits: Limits, base: str, close: Callable[[], None]) -> None:
        self.handle, self.limits, self.base, self._close = handle, limits, base, close
        self.draining = False
        self.changes = Changes()
        self._changing = asyncio.Lock()
        self._own = {
            ("GET", "/healthz"): self._alive,
            ("GET", "/readyz"): self._ready,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/adapters"): self._adapters,
            ("GET", "/v1/replicas"): self._replicas,
        }

    def start(self) -> None:
        self.changes.start()

    def stop(self) -> None:
        """Let the replicas go."""
        self.draining = True
        self.changes.stop()
        self._close()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        asked = Asked(_plain(scope), b"", scope["inlay.key"])
        own = self._own.get((scope["method"], asked.path))
        if own is not None:
            await (await own(asked))(scope, receive, send)
            return
        if self.draining:
            raise Problem(503, "the server is stopping", "stopping", headers={"Retry-After": "1"})
        if scope["method"] not in ("GET", "HEAD"):  # nobody's body is kept where no key is asked for
            if asked.path in OPEN:
                raise Problem(405, f"{asked.path} is there to be read", "method_not_allowed", headers={"Allow": "GET"})
            try:
                asked = replace(asked, body=await _body(receive))
            except Gone:
                return
        asked = replace(asked, adapter=_adapter(asked, self.base))
        relay = Relay(send, self.limits.slow)
        try:
            if asked.path in (LOAD, UNLOAD):
                await asyncio.shield(self._change(asked, relay))  # what has begun is done, whether the client waits
            else:
                await unless_gone(receive, self._answered(asked, relay))
        except (Gone, OSError, TimeoutError):
            pass
        left = "" if relay.ended else " (the client has gone, or reads too slowly)"
        scope["inlay.note"] = f" at {relay.replica}{left}"

    # ---- one replica

    async def _answered(self, asked: Asked, relay: Relay) -> None:
        """Have a replica answer; another one, where it ends. Raises: Problem."""
        for _ in range(TRIES):
            try:
                await self._once(asked, relay)
                return
            except LOST as error:
                log.warning("replica %s has failed a request: %s", relay.replica or "?", type(error).__name__)
                if relay.begun:
                    if not relay.ended:
                        await relay.cut()
                    return
                if not isinstance(error, Unfit) and (asked.scope["method"] == "DELETE" or asked.path == FEEDBACK):
                    said = "the replica has ended, and nobody knows whether it has done that. Look, and ask again."
                    raise Problem(503, said, "replica_lost") from None
                if relay.replica:
                    asked = replace(asked, avoid=(*asked.avoid, relay.replica))
                relay.again()
        said = f"{TRIES} replicas failed while they had this request"
        raise Problem(503, said, "replica_lost", headers={"Retry-After": "5"})

    async def _once(self, asked: Asked, relay: Relay) -> None:
        changes = None
        while True:
            version = self.changes.version
            stream = self.handle.options(stream=True).remote(replace(asked, version=version, changes=changes))
            whole = False
            try:
                first = (await self._first(stream))[0]
                if first["type"] == BEGAN:
                    relay.replica = first["replica"]
                    async for messages in stream:
                        await self._take(messages, relay)
                        if relay.ended:
                            break
                    whole = True
                    return
                whole = True
                if first["type"] == UNFIT:
                    relay.replica = first["replica"]
                    log.error("replica %s can serve nothing: %s", first["replica"], first["said"])
                    raise Unfit
                assert first["type"] == BEHIND
                changes = self.changes.all()
            finally:
                if not whole:
                    stream.cancel()

    async def _first(self, stream: Any) -> Any:
        """What a replica says first. Raises: Problem where none begins."""
        try:
            return await asyncio.wait_for(anext(stream), WAIT)
        except (TimeoutError, RayServeException):
            said = "no replica is there to answer"
            raise Problem(503, said, "no_replica", headers={"Retry-After": "5"}) from None

    async def _take(self, messages: list[Any], relay: Relay) -> None:
        for message in messages:
            if message["type"] == CHANGED:
                relay.changed = message
            else:
                await relay.take(message)

    async def _change(self, asked: Asked, relay: Relay) -> None:
        """Load or unload at one replica, and then at all others. Raises: Problem."""
        async with self._changing:
            kept: list[Any] = []

            async def keep(message: Any) -> None:
                kept.append(message)

            send, relay.send = relay.send, keep
            await self._answered(asked, relay)
            if relay.changed is not None and relay.changed["path"] is not None and asked.adapter is not None:
                self.changes.add(asked.adapter, relay.changed["path"], relay.changed["served"])
                await self._all("catch_up", self.changes.version, self.changes.all())
        for message in kept:
            await send(message)

    # ---- all replicas

    async def _all(self, method: str, *given: Any) -> list[Any]:
        """What every replica says; those that end meanwhile say nothing. Raises: Problem where none says anything."""
        try:
            found = await self.handle.broadcast(method, *given).results_async(timeout_s=ALL, return_exceptions=True)
        except (TimeoutError, RayServeException, RayError):
            found = []
        for error in found:
            if isinstance(error, Exception) and not isinstance(error, LOST):
                log.error("a replica failed at %s", method, exc_info=error)
        found = [one for one in found if not isinstance(one, BaseException)]
        if not found:
            raise Problem(503, "no replica is there to answer", "no_replica", headers={"Retry-After": "5"})
        return found

    async def _bodies(self, asked: Asked) -> tuple[dict[str, bytes], Any]:
        """Each replica's answer to one request; where one refuses, its refusal beside them."""
        asked = replace(asked, version=self.changes.version, changes=self.changes.all())
        answers = await self._all("whole", asked)
        refused = next((one for one in answers if one["status"] != 200), None)
        refusal = None if refused is None else Json(json.loads(refused["body"]), refused["status"])
        return {one["replica"]: one["body"] for one in answers}, refusal

    async def _alive(self, asked: Asked) -> Any:
        return Json({"status": "alive"})

    async def _ready(self, asked: Asked) -> Any:
        there = [] if self.draining else await self._all("state")
        return Json(
            {"status": "ready", "replicas": len(there)} if there else {"status": "not ready"}, 200 if there else 503
        )

    async def _adapters(self, asked: Asked) -> Any:
        bodies, refusal = await self._bodies(asked)
        return refusal or Json(merged_adapters(bodies))

    async def _metrics(self, asked: Asked) -> Any:
        from starlette.responses import Response

        bodies, refusal = await self._bodies(asked)
        return refusal or Response(merged_metrics(bodies), media_type="text/plain; version=0.0.4")

    async def _replicas(self, asked: Asked) -> Any:
        """What each replica does, and which adapters are loaded there."""
        if not asked.key.admin:
            raise Problem(403, "replicas name all adapters and need an admin's key", "not_admin")
        found = await self._all("state")
        return Json({"object": "list", "data": sorted(found, key=lambda one: one["replica"])})


def _plain(scope: Any) -> dict[str, Any]:
    """What a replica gets of ASGI's scope; it knows who asks by their key's name, and needs no secrets."""
    headers = [(name, value) for name, value in scope.get("headers", ()) if name.lower() not in SECRETS]
    return {**{name: scope[name] for name in SCOPE if name in scope}, "headers": headers}


async def _body(receive: Any) -> bytes:
    """The request's whole body; the guard bounds it. Raises: Problem; Gone where the client goes before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _adapter(asked: Asked, base: str) -> str | None:
    """What a request is routed by: an adapter, an experiment, or a mix's adapters; None where any replica will do."""
    field = FIELDS.get(asked.path)
    if field is None:
        return None
    try:
        body = json.loads(asked.body)
        model = body.get(field) if isinstance(body, Mapping) else None
        if isinstance(model, str) and field == "model" and model.lstrip().startswith("{"):
            model = json.loads(model)
    except (ValueError, RecursionError):
        return None
    if isinstance(model, Mapping):
        return " + ".join(sorted(map(str, model)))
    return model if isinstance(model, str) and model != base else None
