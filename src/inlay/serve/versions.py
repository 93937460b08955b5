"""Versions of adapters in a bank: loaded whole, checked, and let go when the last row that uses them has ended."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from inlay.bank.adapter import Adapter
from inlay.bank.bank import Bank
from inlay.bank.narrowing import narrow
from inlay.errors import UsageError
from inlay.formats.notes import Notes, read_notes

from .folders import Folders, Signature, digest_of, newest, signature_of
from .refusals import NotSettled

__all__ = ["Loaded", "Versions"]


log = logging.getLogger("inlay.serve")


@dataclass(frozen=True, eq=False)
class Loaded:
    """One version: its bank, its name there, the bytes of its parameters, its method, its notes, and the folder and
    the files that it was read from."""

    bank: Bank
    name: str
    bytes: int
    method: str
    notes: Notes
    folder: Path
    signature: Signature


class Versions:
    """All methods are for the thread that owns the bank; `bytes` is what the adapters there take. `verify` raises where
    an adapter of the bank cannot answer; `on_drop` is called when adapters have left the bank."""

    def __init__(self, bank: Bank, folders: Folders, numbers: Iterator[int]) -> None:
        self.bank, self.folders, self.bytes, self._numbers = bank, folders, 0, numbers
        self.verify: Callable[[str], None] = lambda name: None
        self.on_drop: Callable[[], None] = lambda: None
        self._left: list[Loaded] = []
        self._inner: set[str] = set()  # adapters that came with another, a fusion's for one
        self._verified: set[bytes] = set()

    def rests(self, loaded: Loaded) -> bool:
        """Whether no row in flight uses a version."""
        return not self.bank.rows_in_flight(loaded.name)

    def load(self, name: str, folder: Path, settle: float) -> tuple[Loaded, bytes]:
        """A new version, and what names its content; nothing is in the bank where it fails. The first of its kind is
        verified: whether a forward works depends on the methods and their places, and values that overflow end their
        own rows alone.

        Raises: NotSettled where files change meanwhile, or have changed less than `settle` seconds ago; Forbidden;
        InlayError.
        """
        self.folders.check(folder)
        signature = signature_of(folder)
        if 0 <= time.time() - newest(signature) < settle:
            raise NotSettled(folder)
        own, before = f"{name}@{next(self._numbers)}", set(self.bank.adapters)
        content = digest_of(folder) if signature else b""
        try:
            notes, adapter = read_notes(folder), self.bank.load(own, folder)
            self._copy([name for name in self.bank.adapters if name not in before])
            inner = tuple(other for other in self.bank.adapters if other not in before and other != own)
            for other in inner:
                self.folders.check(Path(other))
            if signature_of(folder) != signature:
                raise NotSettled(folder)
            if (kind := _kind(adapter)) not in self._verified:
                self.verify(own)
                self._verified.add(kind)
        except BaseException:
            self._remove([other for other in reversed(self.bank.adapters) if other not in before])
            raise
        self._inner.update(inner)
        size = _bytes([adapter, *(self.bank.adapters[name] for name in inner)])
        self.bytes += size
        return Loaded(self.bank, own, size, _title(adapter), notes, folder, signature), content

    def _copy(self, names: Sequence[str]) -> None:
        """Give adapters that were just read memory of their own: safetensors maps a file, and who writes into it would
        change them, or end the process. They only answer, and are held as narrow as that allows."""
        parts = [part for name in names for part in self.bank.adapters[name].parts]
        held = [p.constants for name, own in self.bank.adapters.items() if name not in names for p in own.parts]
        copies: dict[int, Mapping[str, Tensor]] = {id(constants): constants for constants in held}
        for part in parts:
            for own in part.params.values():
                for value in own.values():
                    value.data = value.data.clone()
            spot = id(part.constants)
            if spot not in copies:
                copies[spot] = {name: value.clone() for name, value in part.constants.items()}
                held.append(part.constants)  # while it lives, its id is nobody else's
            part.constants = copies[spot]
        for name in names:
            narrow(self.bank.adapters[name])
            self.bank.adapters[name].fixed = True

    def leave(self, loaded: Loaded) -> None:
        """Let a version go when its last row has ended."""
        self._left.append(loaded)

    def sweep(self) -> None:
        """Take what was let go, and is in no row, out of the bank."""
        over = [loaded for loaded in self._left if self.rests(loaded)]
        if not over:
            return
        self._left = [loaded for loaded in self._left if loaded not in over]
        for loaded in over:
            try:
                self._remove([loaded.name])
                self.bytes -= loaded.bytes
            except UsageError as error:  # a route of somebody else's
                log.warning("%s", error)
                self._left.append(loaded)
        self._remove([*self._inner])
        self.on_drop()

    def _remove(self, names: list[str]) -> None:
        """Adapters that others are over stay until these have gone."""
        for name in names:
            used = any(name in other.uses for other in self.bank.adapters.values())
            if name in self.bank.adapters and not used:
                self.bank.remove(name)
                self._inner.discard(name)


def _bytes(adapters: list[Adapter]) -> int:
    parts = [part for adapter in adapters for part in adapter.parts]
    return sum(v.numel() * v.element_size() for part in parts for own in part.params.values() for v in own.values())


def _title(adapter: Adapter) -> str:
    return " + ".join(dict.fromkeys(method.title for method in adapter.methods))


def _kind(adapter: Adapter) -> bytes:
    """Names an adapter's methods, with their settings, and where they act."""
    parts = [f"{type(part.method).__qualname__} {part.method!r} {[*part.sites]}" for part in adapter.parts]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()
