"""What people may write for one row of a route, what it means, and what is in force while a route is open."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inlay.errors import UsageError

from .noise import Noise

__all__ = ["Blend", "Route", "RowSpec", "normalise"]

RowSpec = str | Sequence[str] | Mapping[str, float] | None
"""One row: an adapter's name, None for the plain base, a list (chained in that order), or {name: weight}."""

ROWS = "Give a name, None, a list of names (chained) or {name: weight}."

Blend = tuple[tuple[str, float | None], ...]
"""A row's adapters with their weights; the weight None means chained: each adapter sees the one before it."""


def normalise(row: RowSpec, known: Mapping[str, object]) -> Blend:
    """Check one row of a route against the adapters there are. Raises: UsageError naming what is no adapter, and
    weights that are no numbers."""
    if row is None:
        return ()
    if isinstance(row, str):
        blend: Blend = ((row, None),)
    elif isinstance(row, Mapping):
        blend = tuple((name, _weight(name, weight)) for name, weight in row.items())
    elif isinstance(row, Iterable) and not isinstance(row, bytes):
        blend = tuple((name, None) for name in row)
    else:
        raise UsageError(f"{row!r} is no row of a route", ROWS)
    for name, _ in blend:
        if not isinstance(name, str):
            raise UsageError(f"{name!r} in the row {row!r} of a route is no adapter's name", ROWS)
        if name not in known:
            there = ", ".join(map(repr, known)) or "none"
            raise UsageError(f"no adapter is called {name!r}", f"Adapters here: {there}.")
    return blend


def _weight(name: str, weight: Any) -> float:
    try:
        value = math.nan if isinstance(weight, (bool, str)) else float(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"the weight {weight!r} of adapter {name!r} is no finite number", "Give one, such as 0.5.")
    return value


@dataclass(eq=False)
class Route:
    """The blends of rows, or of packed segments with their `lengths` in tokens.

    `head_tokens` says how many tokens of each segment go on to the head; `places` before which of its own tokens each
    row's virtual ones stand; `prompts` how many tokens of each are its prompt; `noise` switches dropout on; `going` are
    the pasts of segments that go on from a store. `cache` holds what is computed once for all forwards of the route.
    """

    blends: list[Blend]
    lengths: list[int] | None = None
    head_tokens: list[int] | None = None
    noise: Noise | None = None
    places: list[int] | None = None
    prompts: list[int] | None = None
    going: Any = None
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def uniform(self) -> bool:
        """Whether all rows have one blend, so that no token has to be told from another."""
        return all(blend == self.blends[0] for blend in self.blends)
