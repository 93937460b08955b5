"""What people may write for one row of a route, and what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inlay.errors import UsageError

__all__ = ["Blend", "RowSpec", "groups_of", "normalise"]

RowSpec = str | Sequence[str] | Mapping[str, float] | None
"""One row: an adapter's name, None for the plain base, a list (stacked in that order), or {name: weight}."""

Blend = tuple[tuple[str, float | None], ...]
"""A row's adapters with their weights; the weight None means stacked: each adapter sees the one before it."""


def normalise(row: RowSpec, known: Mapping[str, object]) -> Blend:
    """Check one row of a route against the adapters there are. Raises: UsageError naming an unknown adapter."""
    if row is None:
        blend: Blend = ()
    elif isinstance(row, str):
        blend = ((row, None),)
    elif isinstance(row, Mapping):
        blend = tuple((name, float(weight)) for name, weight in row.items())
    else:
        blend = tuple((name, None) for name in row)
    for name, _ in blend:
        if name not in known:
            there = ", ".join(map(repr, known)) or "none"
            raise UsageError(f"no adapter is called {name!r}", f"Adapters here: {there}.")
    return blend


def groups_of(rows: Sequence[Blend]) -> dict[Blend, list[int]]:
    """Rows that share a blend, so that each is computed once; rows of the plain base are left out."""
    groups: dict[Blend, list[int]] = {}
    for index, blend in enumerate(rows):
        if blend:
            groups.setdefault(blend, []).append(index)
    return groups
