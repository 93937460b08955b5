"""What a measure says in words, and what a change of an adapter costs.

An adapter's gain is by how much its loss lies below the base's on the same rows (or, where the base's head was drawn
at random, below that of the trained head alone). What is changed about it is free
where the loss rises by at most `SPARE` of the gain even at the upper end of its 95 % interval; it costs where the whole
interval lies above zero; else the rows do not tell. Without a gain nothing can be lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["NONE", "Change", "Cost", "Finding", "Settings", "cost_of", "counted", "listed", "within"]

SPARE = 0.1


@dataclass(frozen=True)
class Finding:
    """`words` about a thing, and what to try (`then`, empty where nothing follows); `noise` is whether the rows, or the
    numbers, do not tell it from chance."""

    about: str
    words: str
    then: str = ""
    noise: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        values = asdict(self)
        return {"about": self.about, "words": self.words, "try": values["then"], "noise": self.noise}


Cost = Literal["free", "costs", "unclear"]
Change = Mapping[str, Any]
"""An `inlay.inspection.effects.Effect`."""


Settings = Mapping[str, Any]
"""Those that the adapter's method takes, by name: what is to be tried is said in them alone."""
NONE: Settings = {}


def cost_of(change: Change, gain: float) -> Cost:
    """Whether a change of the adapter is free, costs, or cannot be told; see above."""
    interval = change["interval"]
    if interval is None or not gain > 0:
        return "unclear"
    if interval[1] <= SPARE * gain:
        return "free"
    return "costs" if interval[0] > 0 else "unclear"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if abs(value) >= 0.001 or not value else f"{value:+.1e}"


def within(change: Change) -> str:
    """By how much the loss differs, with its interval."""
    ends = change["interval"]
    between = "" if ends is None else f", 95 % interval {_signed(ends[0])} to {_signed(ends[1])}"
    return f"{_signed(change['difference'])}{between}"


def counted(number: int, thing: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
