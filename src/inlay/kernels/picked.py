"""Low-rank products of many adapters over few tokens each on a GPU, where a vector's factors are picked by number.

A bag of rows (`inlay.kernels.bags`), which a CPU reads one behind the other, is a loop of one thread there. The numbers
are a tensor that may be written over, so that a captured step serves other adapters too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .bags import RANK, Slots

__all__ = ["NOTHING", "Picked", "filled_up", "kernels_for", "picks"]

PICKS = ["cuda"]
"""Kinds of devices whose products are picked."""
NOTHING = 0
"""The slot whose factors are zeros."""


def picks(device: torch.device) -> bool:
    """Whether products are picked there."""
    return device.type in PICKS


@cache
def _triton_there() -> bool:
    return find_spec("triton") is not None


def kernels_for(tensor: Tensor) -> bool:
    """Whether kernels in Triton's language can run on a tensor."""
    return tensor.is_cuda and _triton_there()


@dataclass(eq=False)
class Picked:
    """The products of one x at n layers that read it: `downs` (slots * in, 8 n), `ups` one (slots * 8, out) for each.

    `numbers` int64 (vectors, units) are the slots that each vector goes through, filled up with NOTHING.
    """

    numbers: Tensor
    downs: Tensor
    ups: tuple[Tensor, ...]

    @classmethod
    def of(cls, slots: Slots, downs: Tensor, ups: tuple[Tensor, ...]) -> Picked:
        return cls(numbers_of(slots, downs.device), downs, ups)

    def low(self, x: Tensor) -> Tensor:
        """What D gives for x (vectors, in): (vectors, units, 8 n), or parts of it that `add_high` sums up."""
        if kernels_for(x):
            from .gpu.products import low

            return low(x, self.downs, self.numbers)
        vectors, units = self.numbers.shape
        whole = self.downs.view(-1, x.shape[1], self.downs.shape[1])
        own = whole.index_select(0, self.numbers.flatten()).unflatten(0, (vectors, units))
        return (x[:, None, None] @ own)[:, :, 0]

    def add_high(self, y: Tensor, low: Tensor, layer: int) -> None:
        """Add to y (vectors, out) what U of one layer gives for `low`."""
        if kernels_for(y):
            from .gpu.products import add_high

            add_high(y, low, self.ups[layer], self.numbers, layer)
            return
        own = low[..., layer * RANK : (layer + 1) * RANK].flatten(1)[:, None]
        ups = self.ups[layer].view(-1, RANK, y.shape[1]).index_select(0, self.numbers.flatten())
        y.add_((own @ ups.view(len(y), -1, y.shape[1]))[:, 0])


def filled_up(slots: Slots, units: int) -> list[list[int]]:
    """The slots of each vector, with NOTHING for the rest of `units`."""
    return [[*own, *[NOTHING] * (units - len(own))] for own in slots]


@lru_cache(16)
def numbers_of(slots: Slots, device: Any) -> Tensor:
    return torch.tensor(filled_up(slots, max(1, *map(len, slots))), device=device)
