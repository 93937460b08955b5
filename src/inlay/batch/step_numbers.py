"""What a step of rows with one new token each is told in numbers: one tensor, so that one copy brings them all to the
device, and a step that was captured finds the next ones where its own were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .past import BLOCK, Past

__all__ = ["Single", "StepNumbers"]

Single = tuple[Past, int, int]
"""A row's past, its new token, and by how much its adapters move its positions."""
AHEAD = 5


@dataclass(frozen=True, eq=False)
class StepNumbers:
    """`whole` int64 (5 + blocks, rows): of each row its new token, that token's position, the place of its key in the
    store, how many keys the row has then and how many of them are a prefix's; and its blocks, padded with 0. `prefixed`
    is whether any row has a prefix."""

    whole: Tensor
    prefixed: bool

    @classmethod
    def room(cls, rows: int, blocks: int, prefixed: bool, device: torch.device) -> StepNumbers:
        return cls(torch.zeros(AHEAD + blocks, rows, dtype=torch.long, device=device), prefixed)

    def fill(self, rows: Sequence[Single], spare: int) -> None:
        """Tell the next step's; what is left of the columns repeats a row that writes to the block `spare`."""
        own = [(*_told(*row), row[0].blocks) for row in rows]
        own += [(0, 1, spare * BLOCK + 1, 2, 0, [spare])] * (self.whole.shape[1] - len(rows))
        blocks = len(self.whole) - AHEAD
        columns = [[*told, *named[:blocks], *[0] * (blocks - len(named))] for *told, named in own]
        self.whole.copy_(torch.tensor(columns).t())

    def earlier(self, spare: int) -> Tensor:
        """What `whole` would be for steps that never were: other tokens a place before, which see a key less and write
        to the block `spare`."""
        made = self.whole.clone()
        made[:2].sub_(1).clamp_(min=0)
        made[2] = spare * BLOCK
        made[3].sub_(1)
        return made

    @property
    def ids(self) -> Tensor:
        """(1, rows)"""
        return self.whole[:1]

    @property
    def positions(self) -> Tensor:
        """(1, rows)"""
        return self.whole[1:2]

    @property
    def spots(self) -> Tensor:
        return self.whole[2]

    @property
    def keys(self) -> Tensor:
        return self.whole[3]

    @property
    def prefix(self) -> Tensor:
        return self.whole[4]

    @property
    def table(self) -> Tensor:
        """(rows, blocks)"""
        return self.whole[AHEAD:].t()


def _told(past: Past, token: int, shift: int) -> tuple[int, int, int, int, int]:
    at = past.keys
    spot = past.blocks[at // BLOCK] * BLOCK + at % BLOCK
    return token, past.virtual + past.own + shift, spot, at + 1, past.prefix
