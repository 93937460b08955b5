"""API keys: a file of their hashes with what each may use, and the rate that each has left."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from inlay.errors import InlayError, UsageError

from .limits import Rate

__all__ = ["EVERYBODY", "Key", "Keys", "Rates"]

TABLE = """CREATE TABLE IF NOT EXISTS keys (
    name TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE, adapters TEXT, rate TEXT, admin INTEGER NOT NULL,
    made REAL NOT NULL)"""
MARK = "inlay-"
"""What keys begin with, so that people and scanners know one when they see it."""


@dataclass(frozen=True)
class Key:
    """Who asks: a `name`, the adapters it may use (None for all), its `rate`, and whether it may load and unload."""

    name: str
    adapters: frozenset[str] | None = None
    rate: Rate | None = None
    admin: bool = False

    def may_use(self, name: str) -> bool:
        return self.adapters is None or name in self.adapters


EVERYBODY = Key("", admin=True)
"""Whoever asks where no keys are given: the server then answers this machine alone."""


class Keys:
    """The keys in a SQLite file, which may change while a server reads it.

    A key is 256 random bits, so one round of SHA-256 keeps it: there is nothing to guess, unlike with passwords.
    Raises: UsageError where the file is not there and not to be made; InlayError where it is none of keys.
    """

    def __init__(self, path: str | Path, make: bool = False) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            if not make:
                raise UsageError(f"{path} holds no keys", "Make one: inlay serve --add-key NAME --keys FILE.")
            self._make()
        self._lock = threading.Lock()
        with self._said():
            self._base = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=5)
            self._base.execute(TABLE)

    def add(self, name: str, adapters: Sequence[str] | None, rate: Rate | None, admin: bool) -> str:
        """Make a key and return it: it stands nowhere else. Raises: UsageError where the name is taken."""
        if not name.strip() or not name.isprintable():
            raise UsageError(f"a key cannot be called {name!r}", "Give letters.")
        key = MARK + secrets.token_urlsafe(32)
        allowed = None if adapters is None else json.dumps(sorted(adapters))
        values = (name, _digest(key), allowed, None if rate is None else str(rate), int(admin), time.time())
        try:
            with self._said():
                self._base.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?)", values)
        except sqlite3.IntegrityError:
            raise UsageError(f"there is a key called {name!r}", "Choose another name, or --drop-key it.") from None
        return key

    def drop(self, name: str) -> None:
        """Raises: UsageError where no key has the name."""
        with self._said():
            gone = self._base.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount
        if not gone:
            raise UsageError(f"no key is called {name!r}", f"Keys: {', '.join(self.names()) or 'none'}.")

    def names(self) -> list[str]:
        with self._said():
            return [name for (name,) in self._base.execute("SELECT name FROM keys ORDER BY name")]

    def find(self, key: str) -> Key | None:
        """Whose key it is; None where it is nobody's."""
        with self._said():
            row = self._base.execute(
                "SELECT name, adapters, rate, admin FROM keys WHERE digest = ?", (_digest(key),)
            ).fetchone()
        if row is None:
            return None
        name, allowed, rate, admin = row
        return Key(name, None if allowed is None else frozenset(json.loads(allowed)), Rate.read(rate), bool(admin))

    def close(self) -> None:
        self._base.close()

    def _make(self) -> None:
        """An empty file that its owner alone reads."""
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError as error:
            raise UsageError(f"{self.path} cannot be made ({error.strerror})", "Choose another path.") from None

    @contextmanager
    def _said(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                raise InlayError(f"the keys in {self.path} cannot be used ({error})", "Check the file.") from None


class Rates:
    """What is left of each key's rate: a bucket of `count` requests that fills evenly in `seconds`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, Rate], tuple[float, float]] = {}

    def wait(self, key: Key) -> float:
        """Take one request: 0 where the key may ask now, else the seconds until it may (then none is taken)."""
        rate = key.rate
        if rate is None:
            return 0.0
        now = self._clock()
        left, since = self._buckets.get((key.name, rate), (float(rate.count), now))
        left = min(rate.count, left + (now - since) * rate.count / rate.seconds)
        if left < 1:
            self._buckets[key.name, rate] = left, now
            return (1 - left) * rate.seconds / rate.count
        self._buckets[key.name, rate] = left - 1, now
        return 0.0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf8", "surrogatepass")).digest()
