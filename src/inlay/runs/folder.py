"""A run's folder: whose it is, what is in it, and whether it can be gone on with."""

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


TOLD = {"config": dict, "data": dict, "status": str, "total_steps": int, "result": dict}
"""What is taken from run.json."""


class RunFolder:
    """Paths of a run's folder, which is made when it is first claimed."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{path} is a file", "Name a folder.")
        self.adapter, self.last = self.path / "adapter", self.path / "last"
        self.story, self.metrics = self.path / "run.json", self.path / "metrics.jsonl"
        self.checkpoints, self.lock = self.path / "checkpoints", self.path / ".lock"
        self.final = self.path / "final.jsonl"

    def told(self) -> dict[str, Any]:
        """What run.json says; nothing where there is none."""
        if not self.story.exists():
            return {}
        try:
            story = json.loads(self.story.read_text(encoding="utf8"))
        except (ValueError, RecursionError, OSError):
            raise InlayError(f"{self.story} cannot be read", "Remove the folder, or choose another one.") from None
        if not isinstance(story, dict) or not all(isinstance(story.get(n, t()), t) for n, t in TOLD.items()):
            raise InlayError(f"{self.story} is not what a run writes", "Remove the folder, or choose another one.")
        return story

    @property
    def finished(self) -> bool:
        return self.told().get("status", "interrupted") not in ("running", "interrupted")

    def check(self, resume: bool) -> None:
        """Raises: UsageError where a run in the folder would be lost, or the folder cannot be made or written."""
        there = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise UsageError(f"{self.path} lies below {there}, which is a file", "Name another folder.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"{there} cannot be written", "Choose another folder.")
        if not self.story.exists():
            return
        if self.finished and not resume:
            raise UsageError(f"{self.path} holds a finished run", "Choose another folder, or remove this one.")
        if not resume:
            raise UsageError(f"{self.path} holds an unfinished run", "Add --resume to go on with it, or remove it.")

    @contextmanager
    def claimed(self, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Keep other runs out; the system itself takes the lock off when this process ends, however it does.

        What fails inside before `begun` says yes leaves the folder as it was, or none where there was none.
        Raises: InlayError where another run is in the folder, or it cannot be written.
        """
        from filelock import FileLock, Timeout

        before = _Before(self.path, self.story)
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
    def room(self, kept: str) -> Iterator[None]:
        """Writing that the run cannot do without; `kept` says what there is where the disk is full.

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

    def __init__(self, path: Path, story: Path) -> None:
        self.path, self.story = path, story
        self.missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        self.names = set() if self.missing else {entry.name for entry in path.iterdir()}
        self.told = story.read_bytes() if story.exists() else None

    def restore(self) -> None:
        """Remove what has come since, and the folders that were made for it; best as can be, on a full disk too."""
        with suppress(OSError):
            for entry in list(self.path.iterdir()) if self.path.is_dir() else []:
                if entry.name not in self.names:
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
            if self.told is not None and self.story.read_bytes() != self.told:
                write_text(self.story, self.told.decode())
            for folder in self.missing:
                folder.rmdir()
