"""The adapters of a server: names that users know, and the versions behind them that rows are routed to."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from inlay.bank.bank import Bank
from inlay.batch.route import RowSpec, normalise
from inlay.errors import InlayError, UsageError

from .entries import AdapterInfo, Anything, Claim, Entry, info_of, plain_names, task_now
from .folders import Folders, Signature, signature_of
from .heads import Homes, Opens, head_missing
from .refusals import Forbidden, NotSettled, UnknownAdapter
from .versions import Loaded

__all__ = ["AdapterInfo", "AdapterStore", "Claim", "Forbidden", "NotSettled", "UnknownAdapter", "plain_names"]

log = logging.getLogger("inlay.serve")

TRIES = 3
"""How often an adapter is loaded whose files change meanwhile."""

T = TypeVar("T")


class AdapterStore:
    """Adapters in `folders`, loaded into `bank` when they are asked for, `memory` bytes of parameters at most.

    Those that rows in flight use stay beyond that. All methods may be called in any thread: what changes the bank is
    handed to the thread that owns it, once `bind` has said how. A folder whose files changed less than `settle`
    seconds ago is not loaded on demand yet: they may not be whole.
    """

    def __init__(
        self, bank: Bank, folders: Sequence[Path], *, memory: int | None = None, settle: float = 0.5,
        opens: Opens | None = None,
    ) -> None:  # fmt: skip
        self.folders, self.settle = Folders(folders), settle
        self._homes = Homes(bank, self.folders, memory, opens)
        self._entries: dict[str, Entry] = {}
        self._retired: list[Entry] = []
        self._hidden: dict[str, Path] = {}  # unloaded by hand: their folders are there still
        self._lock = threading.RLock()
        self._hand_over: Callable[[Callable[[], Any]], Any] = lambda do: do()
        for name, path in self.folders.look().items():
            self._entries[name] = Entry(name, path)

    def bind(
        self, hand_over: Callable[[Callable[[], Any]], Any], check: Callable[[str], None],
        on_drop: Callable[[], None],
    ) -> None:  # fmt: skip
        """`hand_over` runs a function in the thread that owns the bank and returns what it returns; `check` raises
        where an adapter cannot answer; `on_drop` is called when adapters have left the bank."""
        self._hand_over, self._homes.writing.verify, self._homes.writing.on_drop = hand_over, check, on_drop

    # ---- names

    def known(self) -> list[AdapterInfo]:
        """The adapters that are served, by name."""
        with self._lock:
            entries = sorted(self._entries.values(), key=lambda entry: entry.name)
        return [info_of(entry) for entry in entries]

    def info(self, name: str) -> AdapterInfo:
        """One of them. Raises: UnknownAdapter."""
        return info_of(self._entry(name))

    def resolve(self, name: str) -> str:
        """The name, in the bank that writes text, of an adapter that does. As `opened`."""
        _check_writes(self._entry(name))
        return self.opened(name).name

    def opened(self, name: str) -> Loaded:
        """The adapter in its bank, where it is loaded if it was not. It stays there until what runs in the owner's
        thread has returned. Raises: UnknownAdapter; InlayError where it does not load."""
        return self._hand_over(lambda: self._ready(self._entry(name)))

    def load(self, name: str, path: str | Path) -> None:
        """Serve what lies at `path` under `name`; what was there before stays until its last row has ended.

        Raises: Forbidden where the path leads out of the folders, or to a pickle; InlayError where it does not load,
        and then what was there before is served still.
        """
        if not name or len(name) > 200 or not name.isprintable():
            raise UsageError(f"{name!r} is no name of an adapter", "Give printable characters, 200 at most.")
        entry = self._successor(name, path)
        self._hand_over(lambda: self._tried(entry))
        self._install(entry)

    def place(self, name: str, path: str | Path) -> None:
        """`load`, but only when it is asked for: another server has tried it. Raises: Forbidden; UsageError."""
        self._install(self._successor(name, path))

    def _successor(self, name: str, path: str | Path) -> Entry:
        folder = self.folders.path_of(path)
        with self._lock:
            old = self._entries.get(name)
        return Entry(name, folder, version=old.version if old else 0, content=old.content if old else b"")

    def _install(self, entry: Entry) -> None:
        with self._lock:
            self._hidden.pop(entry.name, None)
            if entry.name in self._entries:
                self._retire(entry.name)
            self._entries[entry.name] = entry
        self._hand_over(self.sweep)

    def unload(self, name: str) -> None:
        """Serve an adapter no more; asks that came before are answered. Raises: UnknownAdapter."""
        with self._lock:
            entry = self._entry(name)
            self._hidden[name] = entry.path
            self._retire(name)
        self._hand_over(self.sweep)

    # ---- what the watcher finds

    def seen(self, found: Mapping[str, Path]) -> None:
        """The adapters that lie in the folders now: new ones are served, and those unloaded by hand come back when
        their folder was gone in between."""
        with self._lock:
            self._hidden = {name: path for name, path in self._hidden.items() if path.is_dir()}
            for name, path in found.items():
                if name not in self._entries and self._hidden.get(name) != path:
                    self._entries[name] = Entry(name, path)
                    log.info("adapter %r is served from %s", name, path)

    def gone(self, name: str) -> None:
        """An adapter's files are there no more: asks that came before are answered where it is in memory."""
        with self._lock:
            if name not in self._entries:
                return
            self._retire(name)
        log.info("adapter %r is gone", name)
        self._hand_over(self.sweep)

    def watched(self) -> dict[str, tuple[Path, Signature, bytes]]:
        """The adapters that were loaded, or did not load: their folders, their files as they were then, and what names
        their content."""
        with self._lock:
            entries = [entry for entry in self._entries.values() if entry.loaded or entry.refused]
            return {e.name: (e.path, e.refused or e.signature, e.content) for e in entries}

    def same(self, name: str, signature: Signature) -> None:
        """An adapter's files have changed, and their content has not."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None:
                entry.signature, entry.refused, entry.error = signature, (), None

    def paths(self) -> dict[str, Path]:
        with self._lock:
            return {name: entry.path for name, entry in self._entries.items()}

    def reload(self, name: str) -> None:
        """Load an adapter's files again, which have changed. Raises: as `load`."""
        entry = self._entry(name)
        self._hand_over(lambda: self._tried(entry))
        self._hand_over(self.sweep)

    # ---- asks

    def claim(self, route: RowSpec) -> Claim:
        """The adapters of a route, which are waited for. Raises: UnknownAdapter; UsageError where it is no route."""
        claim = Claim()
        with self._lock:
            for name, _ in normalise(route, Anything()):
                claim.entries[name] = self._entry(name)
            for entry in claim.entries.values():
                entry.waiting += 1
        return claim

    def begin(self, claim: Claim) -> dict[str, str]:
        """The claimed adapters' names in the bank, in the owner's thread. Raises: NotSettled where their files may not
        be whole yet; InlayError where they do not load, or write no text."""
        for entry in claim.entries.values():
            _check_writes(entry)
        return {name: self._ready(entry, self.settle).name for name, entry in claim.entries.items()}

    def release(self, claim: Claim) -> None:
        """Nobody waits for the adapters of a claim any more: they are in flight, or the ask has ended."""
        with self._lock:
            for entry in claim.entries.values():
                entry.waiting -= 1
        claim.entries = {}

    def sweep(self) -> None:
        """Between steps, in the owner's thread: let go of versions whose last row has ended, and of the adapters that
        were used longest ago where they take more memory than they may."""
        with self._lock:
            over = [entry for entry in self._retired if not entry.waiting]
            self._retired = [entry for entry in self._retired if entry.waiting]
            for entry in over:
                self._drop(entry)
            resting = [entry for entry in self._entries.values() if entry.loaded is not None]
        self._homes.sweep()
        if not self._homes.too_large:
            return
        for entry in sorted(resting, key=lambda entry: entry.used or entry.since):
            if entry.loaded is not None and self._homes.holding(entry.loaded).rests(entry.loaded):
                self._drop(entry)
                self._homes.sweep()
            if not self._homes.too_large:
                return

    # ---- in the owner's thread

    def _ready(self, entry: Entry, settle: float = 0.0) -> Loaded:
        if entry.loaded is None:
            if entry.refused and entry.refused == signature_of(entry.path):
                raise entry.why or InlayError(f"adapter {entry.name!r} does not load")
            self._load(entry, settle)
        assert entry.loaded is not None
        entry.used = time.time()
        return entry.loaded

    def _tried(self, entry: Entry) -> None:
        """Load an adapter whose files should be whole, even where they have just changed."""
        for left in reversed(range(TRIES)):
            try:
                self._load(entry)
                return
            except NotSettled:
                if not left:
                    raise

    def _load(self, entry: Entry, settle: float = 0.0) -> None:
        signature, home, writing = signature_of(entry.path), None, self._homes.writing
        try:
            home = self._homes.of(entry)
            loaded, content = home.load(entry.name, entry.path, settle)
        except NotSettled:
            raise
        except Exception as error:
            known = head_missing(entry, writing.bank.model) if home is writing else None
            known = known or (error if isinstance(error, InlayError) else _unforeseen(entry.name, error))
            entry.why = plain_names(known)
            entry.error, entry.refused = str(entry.why), signature
            log.warning("adapter %r does not load: %s", entry.name, entry.error)
            raise known from None
        with self._lock:
            self._drop(entry)
            entry.version += content != entry.content
            entry.loaded, entry.content, entry.signature = loaded, content, loaded.signature
            entry.error, entry.refused, entry.since = None, (), time.time()

    def _drop(self, entry: Entry) -> None:
        if entry.loaded is not None:
            self._homes.holding(entry.loaded).leave(entry.loaded)
            entry.loaded = None

    def _retire(self, name: str) -> None:
        self._retired.append(self._entries.pop(name))

    def _entry(self, name: str) -> Entry:
        with self._lock:
            if name not in self._entries:
                raise UnknownAdapter(name)
            return self._entries[name]


def _check_writes(entry: Entry) -> None:
    if task := task_now(entry):
        raise UsageError(
            f"adapter {entry.name!r} was trained to {task} with a head, and writes no text", "Use /v1/classify."
        )


def _unforeseen(name: str, error: Exception) -> InlayError:
    log.error("adapter %r does not load", name, exc_info=error)
    return InlayError(f"adapter {name!r} does not load ({type(error).__name__})", "See the server's log.")
