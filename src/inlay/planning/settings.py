"""The settings of a plan, by the names of the command's flags: those of the run to come, and what it may take."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from inlay.errors import UsageError
from inlay.runs.settings import PANELS, Settings, as_path
from inlay.runtime.sizes import size_mb
from inlay.values import Count, From, Help, Positive

__all__ = ["WITHOUT", "Limits", "PlanSettings", "limits_of"]

WITHOUT = (
    "method", "set", "init_from", "lr", "patience", "metric", "eval_every", "memory_limit", "checkpoint_every",
    "keep_checkpoints", "resume", "track",
)  # fmt: skip
"""Settings of a run that a plan does not ask for."""
UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
FIRST = PANELS[0]


def _readable(read: Callable[[str], Any], remedy: str) -> From:
    """A text that `read` can read, kept as it is."""

    def convert(value: Any) -> Any:
        if value is None:
            return None
        try:
            read(str(value))
        except (UsageError, ValueError):
            raise ValueError(remedy) from None
        return str(value)

    return From(convert)


def _seconds(text: str) -> float:
    """ "30m", "90s", "1.5h" in seconds. Raises: ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise ValueError(text)
    return float(found[1]) * UNITS[found[2]]


def _served(text: str) -> tuple[int, float | None]:
    """ "8" or "8,40ms": rows at once, and the most milliseconds that a token may take. Raises: ValueError."""
    found = re.fullmatch(r"\s*(\d{1,4})\s*(?:,\s*(\d+(?:\.\d+)?)\s*ms)?\s*", text)
    if found is None or not int(found[1]) or (found[2] is not None and not float(found[2])):
        raise ValueError(text)
    return int(found[1]), None if found[2] is None else float(found[2])


@dataclass(frozen=True)
class Limits:
    """What a run and its adapter may take, None where nothing bounds it: `memory_mb`, `seconds` of training, `file_mb`;
    and in use, `rows` at once with at most `token_ms` a token."""

    memory_mb: float | None = None
    seconds: float | None = None
    file_mb: float | None = None
    rows: int = 1
    token_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    """Everything a plan depends on."""

    out: Annotated[str, From(as_path), Help("the folder that the command will name; nothing is written there")] = (
        "runs/planned"
    )
    memory: Annotated[
        str | None,
        _readable(size_mb, "Write 8GB or 900MB."),
        Help("what training may take; what is free here where unset", FIRST),
    ] = None
    budget: Annotated[
        str | None, _readable(_seconds, "Write 30m, 90s or 1.5h."), Help("what training may take in time: 30m", FIRST)
    ] = None
    file: Annotated[
        str | None, _readable(size_mb, "Write 5MB or 200KB."), Help("the largest file of the adapter: 200KB", FIRST)
    ] = None
    serve: Annotated[
        str | None,
        _readable(_served, "Write 8 or 8,40ms: rows at once, and the most that a token may take."),
        Help("use of the adapter: 8,40ms is 8 rows at once, at most 40 ms a token", FIRST),
    ] = None
    seconds: Annotated[Positive, Help("about how long steps of the methods are tried", FIRST)] = 60.0
    disagree: Annotated[Count, Help("of 100 rows, those on which two models disagree, for the rows to hold out")] = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.disagree > 100:
            raise UsageError(f"--disagree {self.disagree} is more than 100 of 100 rows", "Choose 1 to 100.")


def limits_of(settings: PlanSettings) -> Limits:
    """What the settings allow."""
    rows, token_ms = (1, None) if settings.serve is None else _served(settings.serve)
    return Limits(
        None if settings.memory is None else size_mb(settings.memory),
        None if settings.budget is None else _seconds(settings.budget),
        None if settings.file is None else size_mb(settings.file),
        rows,
        token_ms,
    )
