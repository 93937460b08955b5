"""Which units of a batch belong to which adapters; a unit is a row of a padded batch or a token of a packed one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .route import Blend

__all__ = ["Partition", "Share", "in_order"]

Span = tuple[int, int]


@dataclass(frozen=True)
class Share:
    """What one blend has of a batch: the numbers of its rows or segments, and the spans (start, stop) of units that
    they take, neighbours joined."""

    blend: Blend
    members: tuple[int, ...]
    spans: tuple[Span, ...]

    @cached_property
    def units(self) -> int:
        """How many there are in the spans."""
        return sum(stop - start for start, stop in self.spans)


class Partition:
    """The shares of a batch, one for each different blend, and its `total` of units.

    `sizes` are the units of each row or segment; a row of a padded batch is one unit.
    """

    def __init__(self, blends: Sequence[Blend], sizes: Sequence[int] | None = None) -> None:
        sizes = [1] * len(blends) if sizes is None else sizes
        members: dict[Blend, list[int]] = {}
        spans: dict[Blend, list[Span]] = {}
        start = 0
        for number, (blend, size) in enumerate(zip(blends, sizes, strict=True)):
            members.setdefault(blend, []).append(number)
            own = spans.setdefault(blend, [])
            if own and own[-1][1] == start:
                own[-1] = own[-1][0], start + size
            else:
                own.append((start, start + size))
            start += size
        self.total = start
        self.shares = [Share(blend, tuple(members[blend]), tuple(spans[blend])) for blend in members]


def in_order(pieces: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Pieces of dimension 0, each with where it starts, as one tensor."""
    found = [piece for _, piece in sorted(pieces, key=lambda entry: entry[0])]
    return found[0] if len(found) == 1 else torch.cat(found)
