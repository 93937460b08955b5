"""metrics.jsonl: one line a step, without gaps or doubles however often a run was broken off."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["Journal", "read_journal"]


class Journal:
    """Appends lines to `path`, which is cut to its first `size` bytes: those that the checkpoint knows of.

    Lines that find no room on the disk wait for the next ones.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        # Unbuffered: what a full disk has refused must not be tried again when the file is closed.
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        self._file.truncate(min(size, path.stat().st_size))
        self._size = self._file.seek(0, os.SEEK_END)
        self._waiting = b""

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; numbers that JSON has no word for become null."""
        clean = {key: _finite(value) for key, value in line.items()}
        self._waiting += (json.dumps(clean, ensure_ascii=False) + "\n").encode()
        try:
            self._flush()
        except OSError:
            self._file.truncate(self._size)

    def kept(self) -> int:
        """Put everything on the disk and return its size. Raises: OSError where there is no room."""
        self._flush()
        os.fsync(self._file.fileno())
        return self._size

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        self._file.seek(self._size)
        written = 0
        while written < len(self._waiting):
            written += self._file.write(self._waiting[written:])
        self._size += written
        self._waiting = b""


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
