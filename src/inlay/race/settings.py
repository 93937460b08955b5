"""The settings of a race, by the names of the command's flags."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated

from inlay.errors import UsageError
from inlay.runs.asking import Ask
from inlay.runs.settings import PANELS, Settings, as_share
from inlay.values import Count, From, Help

__all__ = ["WITHOUT", "Budget", "RaceSettings", "parse_budget"]

WITHOUT = ("method", "init_from", "lr", "patience", "eval_every")
"""Settings of a run that a race finds by itself."""
ASKED = {"stop": "stop", "clone": "clone", "go_on": "continue"}
"""Flags that ask something of a race that is there already, and what they ask."""
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}
COUNTS = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6}
FIRST, *_, BEST, _, ASK = PANELS


@dataclass(frozen=True)
class Budget:
    """So many `tokens` trained on by all contenders together, or `seconds` for the whole race; the other is None."""

    tokens: int | None = None
    seconds: float | None = None


def parse_budget(text: str) -> Budget:
    """ "20m", "90s" and "1.5h" are time; "2M", "500k" and "300000" tokens. Raises: UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w*)\s*", text)
    number, unit = (float(found[1]), found[2].removesuffix("tokens")) if found else (0.0, "")
    if number and unit in COUNTS:
        return Budget(tokens=int(number * COUNTS[unit]))
    if number and unit in UNITS:
        return Budget(seconds=number * UNITS[unit])
    raise UsageError(f"budget {text!r} cannot be read", "Write a time (20m, 1.5h) or tokens (2M, 500k).")


@dataclass(frozen=True, kw_only=True)
class RaceSettings(Settings):
    """Everything a race depends on. What a contender varies stands in the `space`; the rest is that of a run."""

    heldout: Annotated[str, From(as_share), Help("share of the rows to score on, or a file; half chooses", BEST)] = (
        "0.1"
    )
    budget: Annotated[str | None, Help("time or tokens for the race: 20m, 2M; whole courses where unset", FIRST)] = None
    space: Annotated[str, Help("what is tried: default, quick, wide, or a race.yaml", FIRST)] = "default"
    contenders: Annotated[Count | None, Help("how many are tried; the space's own number where unset", FIRST)] = None
    seeds: Annotated[Count, Help("contenders of each setting, each with a seed of its own", FIRST)] = 1
    at_once: Annotated[Count | None, Help("contenders in the stream; all where unset", FIRST)] = None
    open: Annotated[bool, Help("show the report while it grows, on this machine alone", FIRST)] = False
    stop: Annotated[str | None, Help("of the race in --out: let this contender leave", ASK)] = None
    clone: Annotated[str | None, Help("of the race in --out: let another like this one enter, with --set", ASK)] = None
    go_on: Annotated[str | None, Help("of the race in --out: one that left goes on", ASK, "--continue")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            parse_budget(self.budget)
        if self.at_once is not None and self.at_once < self.seeds:
            raise UsageError(f"--at-once {self.at_once} has no room for {self.seeds} seeds", "Raise it.")
        if self.set and self.clone is None:
            raise UsageError("--set goes with --clone", "What contenders vary stands in --space.")
        if len(self.asked) > 1:
            raise UsageError(f"{' and '.join(ask.what for ask in self.asked)} are two things", "Ask one at a time.")

    @property
    def asked(self) -> list[Ask]:
        """What is asked of the race in `out`."""
        named = {what: getattr(self, name) for name, what in ASKED.items()}
        return [Ask(what, name, self.set) for what, name in named.items() if name is not None]

    def unasked(self) -> RaceSettings:
        """The settings of the race itself, which goes on."""
        return replace(self, resume=True, set={}, **dict.fromkeys(ASKED))
