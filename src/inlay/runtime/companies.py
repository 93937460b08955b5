"""Which adapters may go through one step that is laid out or captured already: those of which the same tables hold all
that they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from inlay.bank.adapter import Adapter
from inlay.bank.bank import Bank
from inlay.bank.standing import Standing
from inlay.kernels.bags import one_by_one
from inlay.kernels.picked import filled_up, picks
from inlay.kernels.slot_table import SlotTable

from .running import Running

__all__ = ["Companies", "Company", "Owner", "up_to"]

Owner = Adapter | None
"""A row's adapter; None does nothing."""
Slots = tuple[tuple[int, ...], ...]
"""Of an adapter, in each table of its company."""


class Company:
    """Adapters that act at `places`, a layer each with the table of its products, or at some of them."""

    def __init__(self, places: Mapping[str, SlotTable]) -> None:
        self.places = dict(places)
        self.tables = list(dict.fromkeys(places.values()))
        self._slots: WeakKeyDictionary[Adapter, Slots] = WeakKeyDictionary()
        self._found: tuple[Standing, list[Any]] | None = None

    def learn(self, found: Standing, owners: Iterable[Owner]) -> None:
        """Take in adapters whose products are in the tables, and what was `found` that they do. An adapter keeps its
        slots as long as it is there."""
        every = found.products.values()
        self._found = found, [next(one for one in every if table.holds(one)) for table in self.tables]
        for owner in owners:
            if owner is not None and owner not in self._slots:
                self._slots[owner] = tuple(table.slots_of(owner) for table in self.tables)

    def covers(self, owners: Iterable[Owner]) -> bool:
        return all(owner is None or owner in self._slots for owner in owners)

    def units(self, owners: Iterable[Owner]) -> int:
        """How many slots of a table each row of a captured step for them has."""
        counts = (len(slots) for owner in owners if owner is not None for slots in self._slots[owner])
        return up_to(max(counts, default=1), 1)

    def slots(self, owners: Sequence[Owner], rows: int, units: int) -> Tensor:
        """int64 (tables, rows, units); what fills the rows up has none."""
        every = [*owners, *[None] * (rows - len(owners))]
        filled = [filled_up(self._of(table, every), units) for table in range(len(self.tables))]
        return torch.tensor(filled, dtype=torch.long).view(len(self.tables), rows, units)

    def values(self, owners: Sequence[Owner]) -> dict[Any, Any] | None:
        """The values of a forward of rows with these adapters, one new token each; None where they have to be found, as
        where adapters are so few that each one's product is computed by itself."""
        self.settle()
        if self._found is None:
            return None
        found, bags = self._found
        counts = Counter(owner for owner in owners if owner is not None)
        new: dict[int, Any] = {}
        for number, (table, one) in enumerate(zip(self.tables, bags, strict=True)):
            if not number and not picks(one.downs.device):
                shares = [(len(self._slots[owner][number]), count) for owner, count in counts.items()]
                if one_by_one([(units, count) for units, count in shares if units], one.downs.dtype):
                    return None
            slots = self._of(number, owners)
            new[id(one)] = table.bags(slots) if any(slots) else None
        return found.renewed(len(owners), new)

    def settle(self) -> None:
        """Let go of products in tables that have grown since: they are copied there."""
        found = self._found
        if found is not None and not all(t.holds(one) for t, one in zip(self.tables, found[1], strict=True)):
            self._found = None

    def _of(self, table: int, owners: Sequence[Owner]) -> Slots:
        return tuple(() if owner is None else self._slots[owner][table] for owner in owners)


class Companies:
    """All that are known of a bank's adapters."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self.clear()

    def clear(self) -> None:
        """Forget all: adapters have other values."""
        self._known: dict[frozenset[tuple[str, SlotTable]], Company] = {}
        self.forget()

    def forget(self) -> None:
        """Forget the rows that were asked for last, which hold their adapters."""
        self._asked: tuple[tuple[Running, ...], list[tuple[Company, int]]] = (), []

    def owners(self, rows: Iterable[Running]) -> list[Owner]:
        """The adapters of rows that have one at most each."""
        return [self._bank.adapters[row.blend[0][0]] if row.blend else None for row in rows]

    def learn(self, found: Standing | None, rows: Sequence[Running], tables: Mapping[Any, Any]) -> Company | None:
        """Rows have gone a step in which their adapters did what was `found`; None where it was more than products of
        the `tables`."""
        if found is None or not found.alone or not all(map(_alone, rows)):
            return None
        there = [table for table in tables.values() if isinstance(table, SlotTable)]
        places = {path: next((t for t in there if t.holds(bags)), None) for path, bags in found.products.items()}
        whole = {path: table for path, table in places.items() if table is not None}
        if len(whole) < len(places):
            return None
        company = self._known.setdefault(frozenset(whole.items()), Company(whole))
        company.learn(found, self.owners(rows))
        for known in self._known.values():
            known.settle()
        self.forget()
        return company

    def of(self, rows: Sequence[Running]) -> list[tuple[Company, int]]:
        """Those that the rows' adapters may go with, and their units there; the fewest layers first."""
        asked = tuple(rows)
        if self._asked[0] != asked:
            found = []
            if all(map(_alone, rows)):
                different = {owner for owner in self.owners(rows) if owner is not None}
                found = [known for known in self._known.values() if known.covers(different)]
                found = found if different else [company for company in found if not company.places]
            found.sort(key=lambda company: len(company.places))
            self._asked = asked, [(company, company.units(self.owners(rows))) for company in found]
        return self._asked[1]

    def values(self, rows: Sequence[Running]) -> dict[Any, Any] | None:
        """What a forward of the rows, one new token each, need not find out; None where that is not known."""
        made = (company.values(self.owners(rows)) for company, _ in self.of(rows))
        return next((values for values in made if values is not None), None)


def _alone(row: Running) -> bool:
    """Whether a row has one adapter at most, with no weight."""
    return len(row.blend) < 2 and all(weight is None for _, weight in row.blend)


def up_to(number: int, least: int) -> int:
    """The power of two that is no less than either."""
    return max(least, 1 << max(0, number - 1).bit_length())
