"""Looks at the folders of adapters while a server runs: new ones, changed ones, and those that are gone."""

from __future__ import annotations

import logging
import threading

from inlay.errors import InlayError

from .adapters import AdapterStore
from .folders import Signature, digest_of, holds_adapter, signature_of

__all__ = ["Watcher"]

log = logging.getLogger("inlay.serve")


class Watcher:
    """A thread that looks every `interval` seconds.

    Folders are taken as they are at two looks in a row: an adapter is loaded again when its files have changed and then
    stayed, and their content is another; it is gone when it was missed twice. New ones are served at the first look,
    and loaded when they are asked for.
    """

    def __init__(self, adapters: AdapterStore, interval: float = 1.0) -> None:
        self.adapters, self.interval = adapters, interval
        self._changed: dict[str, Signature] = {}
        self._missed: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inlay watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """One look."""
        found = self.adapters.folders.look()
        there = set(found.values())
        missed = {name for name, path in self.adapters.paths().items() if path not in there and not holds_adapter(path)}
        for name in missed & self._missed:
            self.adapters.gone(name)
        self._missed = missed
        self.adapters.seen(found)
        changed = {}
        for name, (path, signature, content) in self.adapters.watched().items():
            now = signature_of(path)
            if now == signature or name in missed:
                continue
            if self._changed.get(name) == now:
                self._reload(name, now, content)
            else:
                changed[name] = now
        self._changed = changed

    def _reload(self, name: str, now: Signature, content: bytes) -> None:
        try:
            path = self.adapters.paths().get(name)
            if path is None:
                return
            if digest_of(path) == content:
                self.adapters.same(name, now)
                return
            self.adapters.reload(name)
            log.info("adapter %r has changed and is loaded again", name)
        except (InlayError, OSError) as error:  # what was loaded before is served still
            log.warning("adapter %r: %s", name, error)

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self.look()
            except Exception:
                log.exception("the folders of adapters cannot be looked at")
