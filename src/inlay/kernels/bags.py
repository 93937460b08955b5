"""Low-rank products of many adapters over few tokens each, as when text is written: no weights are gathered.

    y[v] += sum over the units u of v:  U_u (D_u x[v])

An adapter's product is cut into units of rank 8. Every unit has a slot in two tables, D (slots * in, 8) and U (slots *
8, out), and each vector names the slots that it goes through. `embedding_bag` reads those rows alone and sums them up:
a row never touches what another's adapter holds, and ranks need no padding beyond the eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .bag_sums import bag_sums

__all__ = ["RANK", "Bags", "Factors", "Slots", "one_by_one", "units"]

RANK = 8


Factors = tuple[Tensor, Tensor, float]
"""D (r, in), U (out, r) and the scale of one product."""
Slots = tuple[tuple[int, ...], ...]
"""The slots of each vector."""


def units(rank: int) -> int:
    """How many units a product of `rank` is cut into."""
    return -(-rank // RANK)


def one_by_one(shares: Sequence[tuple[int, int]], dtype: torch.dtype) -> bool:
    """Whether products one after another are faster than bags, by the units and vectors of each: microseconds as
    measured on a core for widths of 576 and 1536, 1 to 32 adapters, ranks of 8 and 32, rows side by side and apart."""
    sums = RANK * sum(rank * count for rank, count in shares)
    each, one_bag = (30 if dtype.itemsize == 2 else 10), (0.16 if len(shares) == 1 else 0.08)
    return each * len(shares) + 0.02 * sums < 12 + one_bag * sums


@dataclass(frozen=True, eq=False)
class Bags:
    """The products of one x at n layers that read it: `downs` (slots * in, 8 n), `ups` one (slots * 8, out) for each.

    `slots` holds, for each vector of x, the slots of its units; none where it has no adapter.
    """

    slots: tuple[tuple[int, ...], ...]
    downs: Tensor
    ups: tuple[Tensor, ...]

    @classmethod
    def of(cls, slots: Sequence[Sequence[int]], products: Sequence[Sequence[Factors]]) -> Bags:
        """`products` are, for each layer, those of the adapters in the order of their slots."""
        downs = [_downs(own) for own in products]
        ups = tuple(_ups(own) for own in products)
        return cls(tuple(map(tuple, slots)), torch.cat(downs, 1) if len(downs) > 1 else downs[0], ups)

    def low(self, x: Tensor) -> Tensor:
        """What D gives for x (vectors, in): (pairs of a vector and a unit, 8 n)."""
        index, offsets, vectors = self._down
        seen = x if vectors is None else x.index_select(0, vectors)
        return bag_sums(self.downs, index, offsets, seen.reshape(-1))

    def high(self, low: Tensor, layer: int) -> Tensor:
        """What U of one layer gives for `low`: (vectors, out)."""
        index, offsets = self._up
        own = low if low.shape[1] == RANK else low[:, layer * RANK : (layer + 1) * RANK]
        return bag_sums(self.ups[layer], index, offsets, own.reshape(-1))

    def add_high(self, y: Tensor, low: Tensor, layer: int) -> None:
        """Add to y (vectors, out) what U of one layer gives for `low`."""
        y.add_(self.high(low, layer))

    @cached_property
    def _down(self) -> tuple[Tensor, Tensor, Tensor | None]:
        width = len(self.downs) * RANK // len(self.ups[0])
        return _down_index(self.slots, width, self.downs.device)

    @cached_property
    def _up(self) -> tuple[Tensor, Tensor]:
        return _up_index(self.slots, self.downs.device)


def _downs(products: Sequence[Factors]) -> Tensor:
    """(slots * in, 8): the rows of each unit of D (r, in) as columns, one unit behind the other."""
    width = products[0][0].shape[1]
    rows = _stacked([down for down, _, _ in products])
    return rows.view(-1, RANK, width).transpose(1, 2).reshape(-1, RANK)


def _ups(products: Sequence[Factors]) -> Tensor:
    """(slots * 8, out): the columns of U (out, r) as rows, with the scale in them."""
    rows = _stacked([up.t() for _, up, _ in products])
    sizes = torch.tensor([units(len(down)) * RANK for down, _, _ in products], device=rows.device)
    scales = torch.tensor([scale for _, _, scale in products], dtype=rows.dtype, device=rows.device)
    return rows.mul_(scales.repeat_interleave(sizes)[:, None])


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Parts (r, width) one behind the other, each filled up with zeros to whole units."""
    if all(len(part) % RANK == 0 for part in parts):
        return torch.cat(list(parts))
    whole = parts[0].new_zeros(sum(units(len(part)) for part in parts) * RANK, parts[0].shape[1])
    start = 0
    for part in parts:
        whole[start : start + len(part)] = part
        start += units(len(part)) * RANK
    return whole


@lru_cache(16)
def _down_index(slots: Slots, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of `downs` for each pair of a vector and a unit; where each pair begins; whose pairs they are."""
    pairs = [(vector, slot) for vector, own in enumerate(slots) for slot in own]
    slot = torch.tensor([s for _, s in pairs], dtype=torch.int32, device=device)
    index = slot[:, None] * width + torch.arange(width, dtype=torch.int32, device=device)
    offsets = torch.arange(len(pairs), dtype=torch.int32, device=device) * width
    vectors = [vector for vector, _ in pairs]
    every = vectors == list(range(len(slots)))
    return index.flatten(), offsets, None if every else torch.tensor(vectors, device=device)


@lru_cache(16)
def _up_index(slots: Slots, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of `ups` for each vector, and where each vector begins; an empty bag gives zeros."""
    flat = torch.tensor([slot for own in slots for slot in own], dtype=torch.int32, device=device)
    index = flat[:, None] * RANK + torch.arange(RANK, dtype=torch.int32, device=device)
    counts = torch.tensor([0, *(len(own) * RANK for own in slots)], dtype=torch.int32, device=device)
    return index.flatten(), counts.cumsum(0, dtype=torch.int32)[:-1]
