"""A run's folder: whose it is, what is in it, and whether it can be gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inlay.errors import InlayError, UsageError

__all__ = ["RunFolder"]


class RunFolder:
    """Paths of a run's folder, which is made when it is first claimed."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{path} is a file", "Name a folder.")
        self.adapter, self.last = self.path / "adapter", self.path / "last"
        self.story, self.metrics = self.path / "run.json", self.path / "metrics.jsonl"
        self.checkpoints, self.lock = self.path / "checkpoints", self.path / ".lock"

    def told(self) -> dict[str, Any]:
        """What run.json says; nothing where there is none."""
        if not self.story.exists():
            return {}
        try:
            story = json.loads(self.story.read_text(encoding="utf8"))
        except ValueError:
            raise InlayError(f"{self.story} is damaged", "Remove the folder, or choose another one.") from None
        return story if isinstance(story, dict) else {}

    @property
    def finished(self) -> bool:
        return self.told().get("status", "interrupted") not in ("running", "interrupted")

    def check(self, resume: bool) -> None:
        """Raises: UsageError where a run in the folder would be lost."""
        if not self.story.exists():
            return
        if self.finished and not resume:
            raise UsageError(f"{self.path} holds a finished run", "Choose another folder, or remove this one.")
        if not resume:
            raise UsageError(f"{self.path} holds an unfinished run", "Add --resume to go on with it, or remove it.")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other runs out; the system itself takes the lock off when this process ends, however it does.

        Raises: InlayError where another run is in the folder.
        """
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InlayError(
                f"another run is at work in {self.path}", "Wait for it, or choose another folder."
            ) from None
        try:
            for left in self.path.rglob(".*.part"):  # what a killed process was writing
                left.unlink(missing_ok=True)
            yield
        finally:
            lock.release()
