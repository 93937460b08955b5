"""Going on with a run, or beyond its end: what must be as it was, and what may be more."""

from __future__ import annotations

import dataclasses
from typing import Any

from inlay.errors import UsageError

from .folder import RunFolder
from .material import Material
from .settings import Settings, differences

__all__ = ["Start", "check_same", "start_of"]

COMPARED = ("digest", "heldout_digest", "rows", "heldout_rows")
"""Of the data, what must not have changed."""
LENGTHS = ("steps", "epochs")


@dataclasses.dataclass(frozen=True)
class Start:
    """What is to be done in a folder: `told` is its run.json where that is to be gone on with.

    `extends` a finished run beyond its end; `over` says that there is nothing to do.
    """

    told: dict[str, Any]
    extends: bool = False
    over: bool = False

    def dtype(self, settings: Settings) -> str:
        """The base's dtype: what was begun with, where nobody says another."""
        return str(self.told.get("dtype") or "auto") if settings.dtype == "auto" else settings.dtype


def start_of(settings: Settings, folder: RunFolder) -> Start:
    """What `settings` ask for. Raises: UsageError where the folder holds a run and they do not say --resume."""
    folder.check(settings.resume)
    if not settings.resume or not folder.story.exists():
        return Start({})
    told = folder.told()
    if not folder.finished:
        return Start(told)
    more = not str(told.get("status")).startswith("diverged") and _asks_for_more(settings, told)
    return Start(told, extends=more, over=not more)


def _asks_for_more(settings: Settings, told: dict[str, Any]) -> bool:
    before = told.get("config") or {}
    if settings.steps is not None:
        return settings.steps > (told.get("total_steps") or before.get("steps") or 0)
    return before.get("steps") is None and settings.epochs > before.get("epochs", settings.epochs)


def check_same(start: Start, settings: Settings, material: Material, folder: RunFolder) -> None:
    """Raises: UsageError showing what differs from the run that is to be gone on with."""
    if not start.told:
        return
    free = LENGTHS if start.extends else ()
    kept, asked = (
        {name: value for name, value in config.items() if name not in free}
        for config in (start.told.get("config") or {}, dataclasses.asdict(settings))
    )
    changed = differences(kept, asked)
    before, now = start.told.get("data") or {}, material.summary()
    changed += [f"data {n} was {before.get(n)}, is {now.get(n)}" for n in COMPARED if before.get(n) != now.get(n)]
    if changed:
        raise UsageError(
            f"{folder.path} was begun otherwise: {'; '.join(changed)}", "Give what was given, or another --out."
        )
