"""metrics.jsonl: one line a step and learner, without gaps or doubles however often a run was interrupted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from inlay.files import finite

__all__ = ["MetricsLog"]


class MetricsLog:
    """Appends lines to `path`, which is cut to its first `size` bytes: those that the checkpoint knows of.

    Lines that a full disk refuses wait for the next ones.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        # Unbuffered: what a full disk has refused must not be tried again when the file is closed.
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        self._file.truncate(min(size, path.stat().st_size))
        self._size = self._file.seek(0, os.SEEK_END)
        self._waiting = b""

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; NaN and infinity become null."""
        self._waiting += (json.dumps(finite(line), ensure_ascii=False) + "\n").encode()
        try:
            self._write()
        except OSError:
            self._file.truncate(self._size)

    def flush(self) -> int:
        """Put every line on the disk; returns the size in bytes. Raises: OSError where the disk is full."""
        self._write()
        os.fsync(self._file.fileno())
        return self._size

    def close(self) -> None:
        self._file.close()

    def _write(self) -> None:
        self._file.seek(self._size)
        written = 0
        while written < len(self._waiting):
            written += self._file.write(self._waiting[written:])
        self._size += written
        self._waiting = b""
