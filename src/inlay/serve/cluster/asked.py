"""What goes between the front and a replica."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.serve.http.keys import Key

__all__ = ["BEGAN", "BEHIND", "CHANGED", "LOAD", "UNFIT", "UNLOAD", "Asked", "Change", "Changes"]

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
BEGAN, BEHIND, CHANGED, UNFIT = "inlay.began", "inlay.behind", "inlay.changed", "inlay.unfit"
"""Messages that are not ASGI's: which replica has begun, that it lacks changes, what a request has changed, and that it
can serve nothing at all."""


@dataclass(frozen=True)
class Change:
    """An adapter that was loaded or unloaded by its `name`: the `number` grows, `path` is its folder."""

    number: int
    name: str
    path: str
    served: bool


@dataclass(frozen=True)
class Asked:
    """A request: ASGI's `scope` (what of it is plain data), its whole `body`, and who asks. `adapter` is what it is
    routed by, None for nothing; replicas to `avoid` have failed it.

    The replica must have the first `version` changes by name; where it has not, it says so, and the request comes
    again with all `changes` that still matter.
    """

    scope: dict[str, Any]
    body: bytes
    key: Key
    adapter: str | None = None
    avoid: tuple[str, ...] = ()
    version: int = 0
    changes: tuple[Change, ...] | None = None

    @property
    def path(self) -> str:
        return self.scope["path"]


class Changes:
    """What was loaded and unloaded by name, the last for each name: a new replica catches up by it.

    A change is forgotten `interval` seconds after its folder has gone, as the replicas' watchers forget it too.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self.version = 0
        self._last: dict[str, Change] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._interval = interval
        self._thread = threading.Thread(target=self._run, name="inlay changes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def add(self, name: str, path: str, served: bool) -> None:
        with self._lock:
            self.version += 1
            self._last[name] = Change(self.version, name, path, served)

    def all(self) -> tuple[Change, ...]:
        """In the order in which they came."""
        with self._lock:
            return tuple(sorted(self._last.values(), key=lambda change: change.number))

    def forget(self, changes: Sequence[Change]) -> None:
        """Forget those of `changes` whose folders are gone."""
        for change in changes:
            if not Path(change.path).is_dir():
                with self._lock:
                    if self._last.get(change.name) == change:
                        del self._last[change.name]

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.forget(self.all())
