"""A run's folder: its paths, its lock, and whether the run in it can be resumed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from inlay.errors import InlayError, UsageError
from inlay.files import write_text

__all__ = ["RunFolder"]


READ = {"config": dict, "data": dict, "status": str, "total_steps": int, "result": dict}
"""The fields of run.json that are read again, and their types."""


class RunFolder:
    """Paths of a run's folder, which is made when it is first claimed.

    A run of one learner has `adapter/` (the best), `last/`, `final.jsonl` and `report.html`; one of `several` has
    `adapters/NAME/`, `last/NAME/` and `final/NAME.jsonl`. Both have `checkpoints/`, `metrics.jsonl`, `run.json`,
    and `events.jsonl` where something happened that settings and rows do not decide.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{path} is a file", "Name a folder.")
        self.record, self.metrics = self.path / "run.json", self.path / "metrics.jsonl"
        self.checkpoints, self.lock = self.path / "checkpoints", self.path / ".lock"
        self.events, self.requests = self.path / "events.jsonl", self.path / "requests"
        self.several = False

    def best(self, name: str) -> Path:
        """The folder of the best adapter of the learner `name`."""
        return self.path / "adapters" / name if self.several else self.path / "adapter"

    def last(self, name: str) -> Path:
        """The folder of its adapter after the last step."""
        return self.path / "last" / name if self.several else self.path / "last"

    def final(self, name: str) -> Path:
        """The file of its answers to the final rows."""
        return self.path / "final" / f"{name}.jsonl" if self.several else self.path / "final.jsonl"

    def read(self) -> dict[str, Any]:
        """The run's record, run.json; empty where there is none. Raises: InlayError where it is none of a run's."""
        if not self.record.exists():
            return {}
        try:
            record = json.loads(self.record.read_text(encoding="utf8"))
        except (ValueError, RecursionError, OSError):
            raise InlayError(f"{self.record} cannot be read", "Remove the folder, or choose another one.") from None
        if not isinstance(record, dict) or not all(isinstance(record.get(n, t()), t) for n, t in READ.items()):
            raise InlayError(f"{self.record} is not what a run writes", "Remove the folder, or choose another one.")
        return record

    @property
    def finished(self) -> bool:
        return self.read().get("status", "interrupted") not in ("running", "interrupted")

    @property
    def busy(self) -> bool:
        """Whether another process is at work in it."""
        from filelock import FileLock, Timeout

        if not self.lock.exists():
            return False
        try:
            with FileLock(self.lock).acquire(timeout=0):
                return False
        except Timeout:
            return True

    def check(self, resume: bool) -> None:
        """Raises: UsageError where a run in the folder would be lost, or the folder cannot be made or written."""
        there = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise UsageError(f"{self.path} lies below {there}, which is a file", "Name another folder.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"{there} cannot be written", "Choose another folder.")
        if not self.record.exists():
            return
        if self.finished and not resume:
            raise UsageError(f"{self.path} holds a finished run", "Choose another folder, or remove this one.")
        if not resume:
            raise UsageError(f"{self.path} holds an unfinished run", "Add --resume to go on with it, or remove it.")

    @contextmanager
    def claimed(self, begun: Callable[[], bool]) -> Iterator[None]:
        """Lock the folder against other runs; the system removes the lock when this process ends, however it does.

        An error inside before `begun` is true leaves the folder as it was, or none where there was none.
        Raises: InlayError where another run is in the folder, or it cannot be written.
        """
        from filelock import FileLock, Timeout

        before = _Before(self.path, self.record)
        lock = FileLock(self.lock)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise InlayError(
                f"another run is at work in {self.path}", "Wait for it, or choose another folder."
            ) from None
        except OSError as error:
            before.restore()
            raise InlayError(f"{self.path} cannot be written ({error.strerror or error})", "Choose another.") from None
        try:
            for left in self.path.rglob(".*.part"):  # what a killed process was writing
                left.unlink(missing_ok=True)
            yield
        except BaseException:
            if not begun():
                before.restore()
            raise
        finally:
            lock.release()

    @contextmanager
    def must_write(self, kept: str) -> Iterator[None]:
        """Writing that the run cannot do without; `kept` says what is safe where the disk is full.

        Raises: InlayError naming the folder.
        """
        try:
            yield
        except OSError as error:
            what = f"{error.filename or self.path} cannot be written ({error.strerror or error}); {kept}"
            first = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Mend that"
            raise InlayError(what, f"{first}, then go on: --resume --out {self.path}.") from None


class _Before:
    """What a folder held, so that it can be put back as it was."""

    def __init__(self, path: Path, record: Path) -> None:
        self.path, self.record = path, record
        self.missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        self.names = set() if self.missing else {entry.name for entry in path.iterdir()}
        self.content = record.read_bytes() if record.exists() else None

    def restore(self) -> None:
        """Remove what has come since, and the folders that were made for it, as far as a full disk allows."""
        with suppress(OSError):
            for entry in list(self.path.iterdir()) if self.path.is_dir() else []:
                if entry.name not in self.names:
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
            if self.content is not None and self.record.read_bytes() != self.content:
                write_text(self.record, self.content.decode())
            for folder in self.missing:
                folder.rmdir()
