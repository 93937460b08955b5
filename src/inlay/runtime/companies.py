"""Which adapters may go through one captured step: those of which the same tables hold all that they do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.bank.adapter import Adapter
from inlay.kernels.picked import NOTHING, Picked
from inlay.kernels.slot_table import SlotTable

__all__ = ["Companies", "Company", "Owner", "up_to"]

Owner = Adapter | None
"""A row's adapter; None does nothing."""


class Company:
    """Adapters that act at `places`, a layer each with the table of its products, or at some of them."""

    def __init__(self, places: Mapping[str, SlotTable]) -> None:
        self.places = dict(places)
        self.tables = list(dict.fromkeys(places.values()))
        self._slots: WeakKeyDictionary[Adapter, Tensor] = WeakKeyDictionary()

    def learn(self, owners: Iterable[Owner]) -> None:
        """Take in adapters whose products are in the tables. An adapter keeps its slots as long as it is there."""
        for owner in owners:
            if owner is not None and owner not in self._slots:
                found = [table.slots_of(owner) for table in self.tables]
                units = max(1, *map(len, found)) if found else 1
                filled = [[*own, *[NOTHING] * (units - len(own))] for own in found]
                self._slots[owner] = torch.tensor(filled, dtype=torch.long).view(len(found), units)

    def covers(self, owners: Iterable[Owner]) -> bool:
        return all(owner is None or owner in self._slots for owner in owners)

    def units(self, owners: Iterable[Owner]) -> int:
        """How many slots of a table each row of a step for them has."""
        if not self.tables:
            return 1
        return up_to(max((self._slots[owner].shape[1] for owner in owners if owner is not None), default=1), 1)

    def slots(self, owners: Sequence[Owner], rows: int, units: int) -> Tensor:
        """int64 (tables, rows, units); what fills the rows up has none."""
        nobody = torch.full((len(self.tables), units), NOTHING)
        own = [nobody if owner is None else self._wide(owner, units) for owner in owners]
        return torch.stack([*own, *[nobody] * (rows - len(own))], 1)

    def _wide(self, owner: Adapter, units: int) -> Tensor:
        own = self._slots[owner]
        return F.pad(own, (0, units - own.shape[1]), value=NOTHING)


class Companies:
    """All that are known."""

    def __init__(self) -> None:
        self._known: dict[frozenset[tuple[str, SlotTable]], Company] = {}

    def learn(self, products: Mapping[str, Picked], tables: Mapping[Any, Any], owners: Iterable[Owner]) -> Company:
        """Adapters that have gone a step together, in which they did nothing but the `products` of `tables`."""
        there = [table for table in tables.values() if isinstance(table, SlotTable)]
        places = {path: next(t for t in there if t.holds(picked)) for path, picked in products.items()}
        company = self._known.setdefault(frozenset(places.items()), Company(places))
        company.learn(owners)
        return company

    def of(self, owners: Sequence[Owner]) -> list[Company]:
        """Those that these adapters may go with; the fewest layers first."""
        different = set(owners)
        found = [company for company in self._known.values() if company.covers(different)]
        return sorted(found, key=lambda company: len(company.places))


def up_to(number: int, least: int) -> int:
    """The power of two that is no less than either."""
    return max(least, 1 << max(0, number - 1).bit_length())
