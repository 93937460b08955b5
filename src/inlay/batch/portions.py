"""Cuts an activation into the parts of its adapters and puts it together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .route import Blend
from .taking import Put, Take, laid_out

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
        self._padded: dict[tuple[int, ...], _Padded] = {}
        self._order = self._moved([u for part in self.parts for u in part.units], sizes)

    def _moved(self, order: list[int], sizes: Sequence[int]) -> Tensor | None:
        if order == sorted(order):
            return None
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        return torch.cat([torch.arange(starts[u], starts[u + 1]) for u in order])

    def split(self, tensor: Tensor, groups: Sequence[Sequence[int]]) -> list[Tensor]:
        """What each of `groups` of part numbers has of `tensor` along dimension 0, its parts one behind the other."""
        if self._order is not None:
            self._order = self._order.to(tensor.device)
            tensor = tensor.index_select(0, self._order)
        if len(groups) == 1:
            return [tensor]
        pieces = tensor.split([part.size for part in self.parts])
        return [pieces[g[0]] if len(g) == 1 else torch.cat([pieces[n] for n in g]) for g in groups]

    def join(self, made: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
        """The inverse of `split`."""
        joined = made[0]
        if len(groups) > 1:
            pieces: dict[int, Tensor] = {}
            for own, numbers in zip(made, groups, strict=True):
                pieces.update(zip(numbers, own.split([self.parts[n].size for n in numbers]), strict=True))
            joined = torch.cat([pieces[n] for n in range(len(self.parts))])
        return joined if self._order is None else joined.index_select(0, self._order.argsort())

    def waste(self, numbers: Sequence[int]) -> float:
        """The share of padding that `together` adds to parts `numbers`."""
        sizes = [self.parts[n].size for n in numbers]
        return len(sizes) * max(sizes) / max(1, sum(sizes)) - 1

    def together(self, tensor: Tensor, numbers: Sequence[int]) -> Tensor:
        """Parts `numbers` of a tensor that holds them alone, one behind the other, as (K, size of the largest, ...)."""
        sizes = tuple(self.parts[n].size for n in numbers)
        if len(set(sizes)) == 1:
            return tensor.reshape(len(sizes), sizes[0], *tensor.shape[1:])
        padded = self._padding(sizes, tensor.device)
        taken: Tensor = Take.apply(tensor, padded.index, padded.home)  # pyright: ignore
        return taken.unflatten(0, (len(sizes), max(sizes)))

    def apart(self, tensor: Tensor, numbers: Sequence[int]) -> Tensor:
        """The inverse of `together`."""
        sizes = tuple(self.parts[n].size for n in numbers)
        flat = tensor.flatten(0, 1)
        if len(set(sizes)) == 1:
            return flat
        padded = self._padding(sizes, tensor.device)
        return Put.apply(flat, padded.index, padded.home, padded.padding)  # pyright: ignore

    def _padding(self, sizes: tuple[int, ...], device: torch.device) -> _Padded:
        if sizes not in self._padded:
            self._padded[sizes] = _Padded.of(sizes, device)
        return self._padded[sizes]


@dataclass(frozen=True)
class _Padded:
    """Parts of `sizes` laid out as equally many rows: `index` (K * n,) what stands where, padding repeats a part's
    first; `home` (total,) where each is; `padding` the places that are none."""

    index: Tensor
    home: Tensor
    padding: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> _Padded:
        lengths = torch.tensor(sizes)
        index, real = laid_out(lengths.cumsum(0) - lengths, lengths)
        places = real.flatten()
        home, padding = (where.nonzero()[:, 0].to(device) for where in (places, ~places))
        return cls(index.flatten().to(device), home, padding)
