"""events.jsonl: what happened in a run that its settings and rows do not decide, so that a resumed run does it again.

Who entered and left the stream, where memory made forwards smaller, and what people asked for while it ran. Each is a
line with the `turn` it belongs to: 0 before the first step, then the steps of the stream in order. A line is on the
disk before anything follows from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from inlay.errors import FormatError
from inlay.files import finite

__all__ = ["Events", "read_events"]

Event = Mapping[str, Any]


class Events:
    """The events of a run in the file `path`, which begins anew where `since` is None. Those of turns after `since`,
    and what was asked at it and is not `done`, were written by a process that is gone: `ahead` gives them back."""

    def __init__(self, path: Path, since: int | None = None, done: Collection[str] = ()) -> None:
        self._path = path
        self._ahead: list[dict[str, Any]] = []
        if since is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            late = {"ask": since}  # a checkpoint may have been written before what was asked at its turn
            self._ahead = [
                event for event in read_events(path)
                if event["turn"] > late.get(event["event"], since + 1) - 1 and event.get("id") not in done
            ]  # fmt: skip
            _end_line(path)

    def ahead(self, turn: int, kind: str, **what: Any) -> Event | None:
        """Take the next event of this kind and turn that is yet to happen again, where there is one."""
        for place, event in enumerate(self._ahead):
            if event["turn"] == turn and event["event"] == kind and all(event.get(n) == v for n, v in what.items()):
                return self._ahead.pop(place)
        return None

    def add(self, turn: int, kind: str, **what: Any) -> None:
        """Write an event. Raises: OSError where the disk is full."""
        line = json.dumps(finite({"turn": turn, "event": kind, **what}), ensure_ascii=False) + "\n"
        with open(self._path, "ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())


def read_events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an events file; a last one that a kill has cut off had no effect yet.

    Raises: FormatError where a line is none of a run's.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        events = [json.loads(line) for line in lines]
        if all(isinstance(event["turn"], int) and isinstance(event["event"], str) for event in events):
            return events
    except (ValueError, TypeError, KeyError):
        pass
    raise FormatError(f"{path} is not what a run writes", "Remove the run's folder, or choose another one.")


def _end_line(path: Path) -> None:
    """Cut off what a kill has left of a line."""
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        file.truncate(whole.rfind(b"\n") + 1)
