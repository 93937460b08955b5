"""Cuts an activation into the parts of its adapters and puts it together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .route import Blend

__all__ = ["Part", "Portions"]


@dataclass(frozen=True)
class Part:
    """Rows or segments that share a blend: their numbers, and how much of dimension 0 they take."""

    blend: Blend
    units: tuple[int, ...]
    size: int


class Portions:
    """Parts of dimension 0, one for each different blend; a unit is a row of a padded batch or a packed segment.

    Units of one blend are usually neighbours, and then cutting and joining copies nothing but the result.
    """

    def __init__(self, blends: Sequence[Blend], sizes: Sequence[int] | None = None) -> None:
        sizes = [1] * len(blends) if sizes is None else sizes
        units: dict[Blend, list[int]] = {}
        for number, blend in enumerate(blends):
            units.setdefault(blend, []).append(number)
        self.parts = [Part(blend, tuple(own), sum(sizes[u] for u in own)) for blend, own in units.items()]
        self.total = sum(sizes)
        self._order = self._moved([u for part in self.parts for u in part.units], sizes)

    def _moved(self, order: list[int], sizes: Sequence[int]) -> Tensor | None:
        if order == sorted(order):
            return None
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        return torch.cat([torch.arange(starts[u], starts[u + 1]) for u in order])

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parts of `tensor` along dimension 0, in the order of `parts`."""
        if len(self.parts) == 1:
            return (tensor,)
        if self._order is not None:
            self._order = self._order.to(tensor.device)
            tensor = tensor.index_select(0, self._order)
        return tensor.split([part.size for part in self.parts])

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if len(pieces) == 1:
            return pieces[0]
        joined = torch.cat(list(pieces))
        return joined if self._order is None else joined.index_select(0, self._order.argsort())
