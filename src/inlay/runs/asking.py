"""What people ask of a run that is under way or over: files in `requests/`, taken between two steps."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.errors import UsageError
from inlay.files import write_json

__all__ = ["ASKS", "Ask", "Requests"]

ASKS = ("stop", "clone", "continue")


@dataclass(frozen=True)
class Ask:
    """To `stop` the learner `name`, to let one `continue` that was dropped, or to `clone` one with other `settings`
    (of its method or its course)."""

    what: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        if self.what not in ASKS or not self.name:
            raise UsageError(f"{self.what} {self.name} is nothing to ask of a race", f"Ask one of {', '.join(ASKS)}.")
        if self.settings and self.what != "clone":
            raise UsageError("settings go with a clone", "Use --clone NAME --set key=value.")

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"what": self.what, "name": self.name, "settings": dict(self.settings), "id": self.id}


class Requests:
    """The folder that asks wait in. Those whose ids are `done` are dropped: a kill came before their files went."""

    def __init__(self, folder: Path, done: set[str] | None = None) -> None:
        self.folder, self._done = folder, done or set()

    def put(self, ask: Ask) -> None:
        """Leave an ask for the run to find."""
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        write_json(self.folder / f"{name}.json", {**ask.to_dict(), "id": name})

    def waiting(self) -> list[Ask]:
        """The asks that wait, the oldest first; a file that holds none is dropped."""
        found = []
        for file in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []:
            try:
                ask = Ask(**json.loads(file.read_text(encoding="utf8")))
            except (ValueError, TypeError, OSError, UsageError):
                ask = None
            if ask is None or ask.id in self._done:
                file.unlink(missing_ok=True)
            else:
                found.append(ask)
        return found

    def drop(self, ask: Ask) -> None:
        """Forget an ask that is done, and on the disk as an event."""
        self._done.add(ask.id)
        (self.folder / f"{ask.id}.json").unlink(missing_ok=True)
