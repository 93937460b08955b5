"""What experiments have seen, in a SQLite file: each write is whole, and what was answered as kept survives a kill."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from inlay.errors import InlayError, UsageError

from .arms import Experiment, Trial

__all__ = ["Counts", "Given", "Measured", "Store"]

log = logging.getLogger("inlay.serve")

TABLES = """
CREATE TABLE IF NOT EXISTS experiments (name TEXT PRIMARY KEY, arms TEXT NOT NULL, phase INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS phases (
    experiment TEXT NOT NULL, phase INTEGER NOT NULL, arms TEXT NOT NULL, PRIMARY KEY (experiment, phase));
CREATE TABLE IF NOT EXISTS answers (
    id TEXT PRIMARY KEY, experiment TEXT NOT NULL, arm TEXT NOT NULL, phase INTEGER NOT NULL, key TEXT NOT NULL,
    unit BLOB NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS answers_at ON answers (at);
CREATE TABLE IF NOT EXISTS feedback (
    number INTEGER PRIMARY KEY AUTOINCREMENT, answer TEXT NOT NULL UNIQUE, experiment TEXT NOT NULL, arm TEXT NOT NULL,
    phase INTEGER NOT NULL, unit BLOB NOT NULL, value REAL NOT NULL, comment TEXT, at REAL NOT NULL,
    first INTEGER NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS feedback_first ON feedback (experiment, unit) WHERE first;
CREATE INDEX IF NOT EXISTS feedback_arm ON feedback (experiment, arm, number);
CREATE TABLE IF NOT EXISTS counts (
    experiment TEXT NOT NULL, arm TEXT NOT NULL, {columns}, PRIMARY KEY (experiment, arm));
"""
DAYS = 30
"""How long an answer's id is kept: feedback may come until then. Counts and feedback stay."""
WAIT = 5.0
"""Seconds that a write waits for another process."""


@dataclass(frozen=True)
class Measured:
    """What one request took. `outcome` is "done", "failed", or "left" by its client; `first` and `between` are the
    seconds to its first token and, on average, between two tokens of its one answer; None where there were none."""

    outcome: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first: float | None = None
    between: float | None = None


@dataclass(frozen=True)
class Counts:
    """Sums over the requests of one arm that have ended; `first` and `between` as in `Measured`, each with the count,
    the sum and the sum of squares."""

    requests: int = 0
    failed: int = 0
    left: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_count: int = 0
    first_sum: float = 0.0
    first_squares: float = 0.0
    between_count: int = 0
    between_sum: float = 0.0
    between_squares: float = 0.0


@dataclass(frozen=True)
class Given:
    """Feedback to one answer: `value` from 0 to 1. `number` grows; `phase` is the experiment's when it was asked;
    `first` says that its unit gave none before."""

    number: int
    arm: str
    phase: int
    value: float
    first: bool


COLUMNS = tuple(field.name for field in fields(Counts))


class Store:
    """The file at `path`, made where it is not there. Several servers may share one.

    Raises: UsageError where the file cannot be made or is none of experiments. Any method raises InlayError where the
    file cannot be read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._writing = ThreadPoolExecutor(1, "experiments")
        self._base: Any = None
        self._reader: Any = None  # readers wait for no writer, of this process or another
        try:
            with suppress(FileExistsError):  # its owner alone reads it: comments are users' own words
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            self._base = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=WAIT)
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = NORMAL")
            columns = ", ".join(f"{name} NUMERIC NOT NULL DEFAULT 0" for name in COLUMNS)
            self._base.executescript(TABLES.format(columns=columns))
            self._base.execute("DELETE FROM answers WHERE at < ?", (time.time() - DAYS * 86400,))
            self._reader = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=WAIT)
        except (OSError, sqlite3.Error) as error:
            self.close()
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"{path} cannot hold experiments ({why})", "Name another file: --state FILE.") from None

    # ---- experiments

    def put(self, experiment: Experiment) -> bool:
        """Set an experiment; what its arms have seen stays. Returns whether its name is new."""
        arms = json.dumps(dict(experiment.arms))
        with self._whole():
            query = "SELECT arms, phase FROM experiments WHERE name = ?"
            row = self._base.execute(query, (experiment.name,)).fetchone()
            phase = 0 if row is None else row[1] + (json.loads(row[0]) != experiment.arms)
            self._base.execute("REPLACE INTO experiments VALUES (?, ?, ?)", (experiment.name, arms, phase))
            self._base.execute("REPLACE INTO phases VALUES (?, ?, ?)", (experiment.name, phase, arms))
        return row is None

    def get(self, name: str) -> Experiment | None:
        rows = self._read("SELECT name, arms, phase FROM experiments WHERE name = ?", _text(name))
        return _experiment(*rows[0]) if rows else None

    def all(self) -> list[Experiment]:
        """By name."""
        return [_experiment(*row) for row in self._read("SELECT name, arms, phase FROM experiments ORDER BY name")]

    def drop(self, name: str) -> bool:
        """Forget an experiment and all that it has seen. Returns whether it was there."""
        with self._whole():
            there = self._base.execute("DELETE FROM experiments WHERE name = ?", (_text(name),)).rowcount > 0
            for table in ("phases", "answers", "feedback", "counts"):
                self._base.execute(f"DELETE FROM {table} WHERE experiment = ?", (_text(name),))
        return there

    # ---- requests

    def began(self, trial: Trial, key: str) -> None:
        """Keep which arm an answer has, before anybody learns its id."""
        values = (trial.id, trial.experiment, trial.arm, trial.phase, key, trial.unit, time.time())
        with self._whole():
            self._base.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def ended(self, trial: Trial, measured: Measured) -> None:
        """Count a request that began; nothing where its experiment has been dropped meanwhile."""
        added = _counted(measured)
        sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in COLUMNS)
        marks = ", ".join("?" * len(COLUMNS))
        with self._whole():
            self._base.execute(
                f"INSERT INTO counts (experiment, arm, {', '.join(COLUMNS)}) SELECT ?, ?, {marks} "
                f"WHERE EXISTS (SELECT 1 FROM answers WHERE id = ?) ON CONFLICT (experiment, arm) DO UPDATE SET {sums}",
                (trial.experiment, trial.arm, *(added[name] for name in COLUMNS), trial.id),
            )

    def end_later(self, trial: Trial, measured: Measured) -> None:
        """`ended`, in a thread of its own: the event loop does not wait for the disk."""

        def write() -> None:
            try:
                self.ended(trial, measured)
            except InlayError as error:
                log.error("a request to %r is not counted: %s", trial.experiment, error)

        with suppress(RuntimeError):  # the server has stopped
            self._writing.submit(write)

    def give(self, answer: str, value: float, comment: str | None, key: str | None) -> tuple[str, bool] | None:
        """Keep feedback to an answer that `key` asked for (None for any). Returns its arm, and whether the value
        stands: the first one that was given does. None where there is no such answer."""
        with self._whole():
            row = self._base.execute(
                "SELECT experiment, arm, phase, unit FROM answers WHERE id = ? AND (? IS NULL OR key = ?)",
                (_text(answer), key, key),
            ).fetchone()
            if row is None:
                return None
            experiment, arm, phase, unit = row
            known = self._base.execute("SELECT value FROM feedback WHERE answer = ?", (answer,)).fetchone()
            if known is not None:
                return arm, known[0] == value
            before = self._base.execute(
                "SELECT 1 FROM feedback WHERE experiment = ? AND unit = ? AND first", (experiment, unit)
            ).fetchone()
            self._base.execute(
                "INSERT INTO feedback (answer, experiment, arm, phase, unit, value, comment, at, first) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (answer, experiment, arm, phase, unit, value, comment and _text(comment), time.time(), before is None),
            )
        return arm, True

    # ---- results

    def counts(self, name: str) -> dict[str, Counts]:
        """By arm."""
        rows = self._read(f"SELECT arm, {', '.join(COLUMNS)} FROM counts WHERE experiment = ?", _text(name))
        return {arm: Counts(*values) for arm, *values in rows}

    def feedback(self, name: str) -> list[Given]:
        """In the order in which it came."""
        rows = self._read(
            "SELECT number, arm, phase, value, first FROM feedback WHERE experiment = ? ORDER BY number", _text(name)
        )
        return [Given(number, arm, phase, value, bool(first)) for number, arm, phase, value, first in rows]

    def phases(self, name: str) -> dict[int, dict[str, float]]:
        """The weights of each phase, by its number."""
        rows = self._read("SELECT phase, arms FROM phases WHERE experiment = ? ORDER BY phase", _text(name))
        return {phase: json.loads(arms) for phase, arms in rows}

    def close(self) -> None:
        """What has ended is still counted."""
        self._writing.shutdown(wait=True)
        for opened in (self._reader, self._base):
            if opened is not None:
                opened.close()

    def _read(self, query: str, *values: str) -> list[Any]:
        with self._said(self._reading):
            return self._reader.execute(query, values).fetchall()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """One write: all of it, or nothing."""
        with self._said(self._lock):
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._base.execute("ROLLBACK")
                raise

    @contextmanager
    def _said(self, lock: threading.Lock) -> Iterator[None]:
        with lock:
            try:
                yield
            except sqlite3.Error as error:
                said = f"the experiments in {self.path} cannot be read or written ({error})"
                raise InlayError(said, "Look at the file and its disk.") from None


def _experiment(name: str, arms: str, phase: int) -> Experiment:
    return Experiment(name, json.loads(arms), phase)


def _counted(measured: Measured) -> Mapping[str, float]:
    made: dict[str, float] = {
        "requests": 1, "failed": measured.outcome == "failed", "left": measured.outcome == "left",
        "prompt_tokens": measured.prompt_tokens, "completion_tokens": measured.completion_tokens,
    }  # fmt: skip
    for name, value in (("first", measured.first), ("between", measured.between)):
        there = value or 0.0
        made |= {f"{name}_count": value is not None, f"{name}_sum": there, f"{name}_squares": there * there}
    return made


def _text(text: str) -> str:
    """Without half characters, which SQLite's UTF-8 does not hold."""
    return text.encode("utf8", "replace").decode()
