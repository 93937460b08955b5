"""Rows that go on from a store of keys and values: which adapters they keep, and the route that their steps share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from inlay.batch.paged import Going
from inlay.batch.route import Blend, Route, RowSpec
from inlay.sites.structure import Structure

from .lookup import Lookup
from .quick import Quick
from .standing import Standing, standing

__all__ = ["Flight", "Goes"]


class Flight:
    """Segments that go on together; their route may be opened for one step after the other, so that what it found out
    at the first is known at the next."""

    def __init__(self, lookup: Lookup, route: Route) -> None:
        self._lookup, self.route = lookup, route

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run what is inside as a step."""
        with self._lookup.routing.open(self.route):
            yield


class Goes:
    """The part of a bank that lets rows go on."""

    base: Structure
    _lookup: Lookup
    _quick: Quick

    def alone(self, lengths: Sequence[int] | None = None) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _checked(self, row: RowSpec) -> Blend:
        raise NotImplementedError

    def going_on(self, rows: Sequence[RowSpec], lengths: Sequence[int], heads: Sequence[int], going: Going) -> Flight:
        """A stream of segments of `lengths` new tokens whose rows go on from a store, `heads` of each of which go on to
        the head; for bases that keep packed segments apart."""
        blends = [self._checked(row) for row in rows]
        return Flight(self._lookup, Route(blends, [*lengths], [*heads], going=going))

    def shift_of(self, blend: Blend) -> int:
        """By how much a row's adapters move the positions of its tokens, in a base that keeps segments apart."""
        (backbone,) = self.base.backbones
        return self._lookup.shift(backbone, blend)

    def taken_by(self, row: RowSpec) -> int:
        """Positions that a row's adapters take from its tokens: those of virtual tokens, and a prefix's."""
        blend = self._checked(row)
        return self._lookup.virtual_length(blend) + self.shift_of(blend)

    def standing(self, flight: Flight) -> Standing | None:
        """What the adapters of a flight's rows do at every step; None where some of it has to be found anew at each.
        The flight has gone a step."""
        names = {name for blend in flight.route.blends for name, _ in blend}
        going, adapters = flight.route.going, [self._lookup.adapters[name] for name in names]
        return standing(going.values, going.known, len(flight.route.blends), adapters)

    @property
    def ignores_padding(self) -> bool:
        """Whether rows give the same behind padding: found out by comparing two tiny ones."""
        return self._lookup.takes_padding(False)

    def quicken(self, copies: bool) -> None:
        """Let rows that go on by a token each take quicker ways through linear layers and norms; with `copies` linear
        layers hold their transpose beside them, which takes as much memory as the base."""
        with self.alone():
            self._quick.install(copies)

    def take_off(self, row: RowSpec) -> Blend:
        """Say that a row is in flight: its adapters cannot be removed until it has landed."""
        blend = self._checked(row)
        self._lookup.routing.in_flight.update(_counted(blend))
        return blend

    def land(self, blend: Blend) -> None:
        """The inverse of `take_off`."""
        self._lookup.routing.in_flight.subtract(_counted(blend))

    def rows_in_flight(self, name: str) -> int:
        """How many rows that have taken off with an adapter have not landed."""
        return self._lookup.routing.in_flight[name]


def _counted(blend: Blend) -> list[str]:
    """Under which names a row is counted: its adapters', and "" as every row."""
    return ["", *(name for name, _ in blend)]
