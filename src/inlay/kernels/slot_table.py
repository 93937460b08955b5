"""The low-rank products of adapters that come and go: each has slots in tables that stay, whoever else is there.

What `inlay.kernels.bags` lays out for one batch is copied once for each adapter here, and not again when rows of other
adapters join or leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from .bags import RANK, Bags, Factors, units
from .picked import NOTHING, Picked, picks

__all__ = ["SlotTable"]

GROWTH = 1.25
"""By how much tables grow, at least, when no slot is free."""
PICKED_GROWTH, PICKED_LEAST = 1.5, 16
"""The same, and with how many slots they begin, where each growth makes captured steps useless."""


class SlotTable:
    """The products of one x at the layers that read it; see `Bags`. Owners that nobody else knows any more give their
    slots back. `plain` are those of whom somebody has noted that they do nothing there beside their products."""

    def __init__(self) -> None:
        self._slots: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()
        self._spare: list[int] = []
        self.plain: WeakSet[Any] = WeakSet()
        self._downs: Tensor | None = None
        self._ups: list[Tensor] = []
        self._room = 0

    def place(self, owner: Any, products: Callable[[], Sequence[Factors]]) -> tuple[int, ...]:
        """The slots of an owner, whose `products` at the layers are asked for and written there when it comes first."""
        known = self._slots.get(owner)
        if known is None:
            made = products()
            known = self._slots[owner] = self._free(made)
            for layer, (down, up, scale) in enumerate(made):
                self._write(known, layer, down, up, scale)
        return known

    def slots_of(self, owner: Any) -> tuple[int, ...]:
        """The slots of an owner; none where it has none, or is None."""
        return () if owner is None else self._slots.get(owner, ())

    def bags(self, slots: Sequence[tuple[int, ...]]) -> Bags | Picked:
        """The products of vectors that go through `slots`."""
        assert self._downs is not None
        if picks(self._downs.device):
            return Picked.of(tuple(slots), self._downs, tuple(self._ups))
        return Bags(tuple(slots), self._downs, tuple(self._ups))

    def holds(self, bags: Bags | Picked) -> bool:
        """Whether these products are those of the table as it is: it may have grown since."""
        return bags.downs is self._downs

    def _free(self, products: Sequence[Factors]) -> tuple[int, ...]:
        count = units(len(products[0][0]))
        if len(self._spare) < count:
            used = {slot for slots in self._slots.values() for slot in slots}
            used |= {NOTHING} if self._downs is not None and picks(self._downs.device) else set()
            self._spare = [slot for slot in range(self._room) if slot not in used]
        if len(self._spare) < count:
            first = self._room
            picked = picks(products[0][0].device)
            growth, least = (PICKED_GROWTH, NOTHING + 1 + PICKED_LEAST) if picked else (GROWTH, 0)
            first = max(first, NOTHING + 1) if picked else first
            self._grow(products, max(first + count - len(self._spare), int(growth * self._room), least))
            self._spare += range(first, self._room)
        taken, self._spare = self._spare[:count], self._spare[count:]
        return tuple(taken)

    def _grow(self, products: Sequence[Factors], room: int) -> None:
        down, width = products[0][0], products[0][0].shape[1]
        before, tables = self._room, [] if self._downs is None else [self._downs, *self._ups]
        shapes = [(room * width, RANK * len(products)), *((room * RANK, len(up)) for _, up, _ in products)]
        whole = [down.new_zeros(shape) for shape in shapes]
        for new, old, each in zip(whole, tables, (width, *[RANK] * len(products)), strict=False):
            new[: before * each] = old
        self._downs, self._ups, self._room = whole[0], whole[1:], room

    def _write(self, slots: tuple[int, ...], layer: int, down: Tensor, up: Tensor, scale: float) -> None:
        assert self._downs is not None
        width, columns = down.shape[1], slice(layer * RANK, (layer + 1) * RANK)
        for unit, slot in enumerate(slots):
            own = slice(unit * RANK, (unit + 1) * RANK)
            low, high = down[own].t(), up[:, own].t()
            here = self._downs[slot * width : (slot + 1) * width, columns]
            there = self._ups[layer][slot * RANK : (slot + 1) * RANK]
            if low.shape[1] < RANK:  # the rest of a unit, where others were before
                here, there = here.zero_()[:, : low.shape[1]], there.zero_()[: len(high)]
            here.copy_(low)
            torch.mul(high, scale, out=there)
