"""Ray Serve's choice of a replica, by the adapter that a request names."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .preferring import preferred

__all__ = ["AdapterRouter"]

UNSENT = 60.0
"""Seconds after which a request that was never sent is not counted: Ray says nothing of those that are cancelled."""


@dataclass
class _Open:
    """A request, and the replica that was chosen for it."""

    replica: str
    request: PendingRequest
    since: float
    sent: bool = False

    @property
    def counts(self) -> bool:
        return self.sent or not (self.request.future.cancelled() or time.monotonic() - self.since > UNSENT)


class AdapterRouter(RequestRouter):
    """Ray Serve asks it for replicas, and says when a request has been sent and when it has ended. It lives beside the
    one handle that asks the replicas, so it counts all requests that they work on, from the moment of the choice.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._open: dict[str, _Open] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica alone, the preferred one first: Ray takes the first that has room."""
        found = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        number = None if pending_request is None else pending_request.metadata.internal_request_id
        self._open = {other: one for other, one in self._open.items() if one.counts and other != number}
        loads = Counter(one.replica for one in self._open.values())
        given: Any = pending_request.args[0] if pending_request is not None and pending_request.args else None
        name, avoid = getattr(given, "adapter", None), getattr(given, "avoid", ())
        order = preferred(name, {one: loads[one] for one in found}, avoid)
        if pending_request is not None and number is not None:
            pending_request.routing_context.should_backoff = True
            if order:
                self._open[number] = _Open(order[0], pending_request, time.monotonic())
        return [[found[one]] for one in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        one = self._open.get(pending_request.metadata.internal_request_id)
        if one is not None:
            one.replica, one.sent = replica_id.unique_id, True

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._open.pop(internal_request_id, None)
