"""Attention of rows that go on, over keys and values in the blocks of a store.

A row's single new token needs no copy of its past: its scores are weighted sums of the rows of K^T, and its output is
one of the rows of V, which `embedding_bag` reads where they lie. Longer runs of new tokens gather their past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from inlay.kernels.bag_sums import bag_sums
from inlay.kernels.picked import kernels_for, picks
from inlay.sites.attention import QKV, is_own

from .blocks import Blocks, StreamMask, attended
from .past import BLOCK, Past, Store
from .step_numbers import StepNumbers

__all__ = ["Reading", "Singles", "Stored", "Writing", "seen"]


def seen(rule: Callable[..., Tensor], q: Tensor, k: Tensor, prefix: Tensor, prefixed: bool) -> Tensor:
    """Which keys (rows, 1, n, keys) each query sees: q (rows, 1, n, 1) and k (rows or 1, 1, 1, keys) count all keys of
    the row, the `prefix` (rows, 1, 1, 1) of them that no token has as well: to those a query stands behind them all.
    `prefixed` is whether there are any."""
    zero = torch.zeros_like(prefix[:1])
    own = rule(zero, zero, q - prefix, k - prefix)
    return torch.where(k < prefix, rule(zero, zero, q, k), own) if prefixed else own


class Writing:
    """Where the new keys and values of a stream go: `spots` are each token's (block, offset) laid out as one number."""

    def __init__(self, spots: Tensor) -> None:
        self.spots = spots
        self._made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def write(self, layer: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
        """k and v (1, heads, tokens, dim) into a layer's blocks."""
        keys, values = layer
        heads, dim, width = k.shape[1], k.shape[3], v.shape[3]
        at_keys, at_values = self._places(heads, dim)
        keys.view(-1).index_copy_(0, at_keys, k[0].transpose(0, 1).reshape(-1))
        values.view(-1, width).index_copy_(0, at_values, v[0].transpose(0, 1).reshape(-1, width))

    def _places(self, heads: int, dim: int) -> tuple[Tensor, Tensor]:
        """Of each number of k (tokens, heads, dim), and of each row of v (tokens, heads)."""
        if (heads, dim) not in self._made:
            block, offset = self.spots // BLOCK, self.spots % BLOCK
            head = block[:, None] * heads + torch.arange(heads, device=block.device)
            row = head[:, :, None] * dim + torch.arange(dim, device=block.device)
            self._made[heads, dim] = (
                (row * BLOCK + offset[:, None, None]).flatten(),
                (head * BLOCK + offset[:, None]).flatten(),
            )
        return self._made[heads, dim]


@dataclass(frozen=True, eq=False)
class Reading:
    """The blocks of rows side by side: `table` (rows, n), padded with block 0; how many `keys` and, of these, keys of a
    `prefix` each row has (rows,); `prefixed` is whether any row has some."""

    table: Tensor
    keys: Tensor
    prefix: Tensor
    prefixed: bool

    @classmethod
    def of(cls, pasts: Sequence[Past], more: Sequence[int], device: torch.device) -> Reading:
        """The rows with as many keys as they have, and `more` each."""
        keys = [past.keys + extra for past, extra in zip(pasts, more, strict=True)]
        width = max(1, max(-(-n // BLOCK) for n in keys))
        rows = [
            [*p.blocks[: -(-n // BLOCK)], *[0] * (width - -(-n // BLOCK))] for p, n in zip(pasts, keys, strict=True)
        ]
        prefix = [past.prefix for past in pasts]
        table, counts, ahead = (torch.tensor(value, device=device) for value in (rows, keys, prefix))
        return cls(table, counts, ahead, any(prefix))

    @classmethod
    def told(cls, numbers: StepNumbers) -> Reading:
        return cls(numbers.table, numbers.keys, numbers.prefix, numbers.prefixed)

    def gather(self, layer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A copy of the rows' keys and values, (rows, heads, n * BLOCK, dim); zeros behind each row's last."""
        keys, values = (blocks.index_select(0, self.table.flatten()).unflatten(0, self.table.shape) for blocks in layer)
        k = keys.permute(0, 2, 1, 4, 3).flatten(2, 3)
        v = values.transpose(1, 2).flatten(2, 3)
        there = self.there[:, None, :, None]
        return torch.where(there, k, 0), torch.where(there, v, 0)

    @cached_property
    def there(self) -> Tensor:
        """(rows, n * BLOCK): which places hold a key."""
        place = torch.arange(self.table.shape[1] * BLOCK, device=self.table.device)
        return place[None] < self.keys[:, None]


class Stored:
    """What stands before the new tokens of rows, in the place of prefixes: see `inlay.batch.prefixes.Prefixes`."""

    def __init__(self, store: Store, pasts: Sequence[Past], device: torch.device) -> None:
        self.store, self.pasts = store, pasts
        self.lengths, self.longest = [past.keys for past in pasts], max(past.keys for past in pasts)
        self._device, self._made = device, {}
        self.turn = 0

    def of(self, module: nn.Module, units: Sequence[int], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """(units, heads, P, dim) keys and values, right-aligned, P the longest of `units`."""
        spot = tuple(units)
        if spot not in self._made:
            own = [self.pasts[unit] for unit in units]
            reading = Reading.of(own, [0] * len(own), self._device)
            width = int(reading.keys.max())
            column = torch.arange(width, device=self._device)[None] - (width - reading.keys)[:, None]
            self._made[spot] = reading, column, width
        reading, column, width = self._made[spot]
        if not width:
            return None
        found = reading.gather(self.store.layer((module, self.turn), k, v))
        index = column.clamp(min=0)[:, None, :, None]
        there = (column >= 0)[:, None, :, None]
        keys, values = (torch.where(there, x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])), 0) for x in found)
        return keys, values


class Runs(Blocks):
    """Blocks of segments of new tokens, behind what is stored of their rows."""

    def _seen(self, mask: StreamMask, block: Any, keys: int) -> Tensor:
        size, device = block.index.shape[1], block.index.device
        width = keys - size
        pasts = [self.prefixes.pasts[unit] for unit in block.units]  # pyright: ignore
        past, prefix = (torch.tensor(n, device=device).view(-1, 1, 1, 1) for n in (
            [own.keys for own in pasts], [own.prefix for own in pasts],
        ))  # fmt: skip
        q = torch.arange(size, device=device).view(1, 1, size, 1) + past
        k = torch.arange(-width, size, device=device).view(1, 1, 1, keys) + past
        front = torch.arange(-width, 0, device=device)[None] >= -past.view(-1, 1)
        there = torch.cat([front, block.real], 1)[:, None, None]
        prefixed = any(own.prefix for own in pasts)
        return seen(mask.function, q, k, prefix, prefixed).expand(len(pasts), 1, size, keys) & there


class Singles:
    """Rows with one new token each, whose keys and values are in the store already."""

    def __init__(self, store: Store, reading: Reading) -> None:
        self.store, self.reading = store, reading
        self._bags: dict[tuple[int, int, int], _Bags] = {}

    def attend(
        self, plain: Callable[..., Any], module: nn.Module, turn: int, qkv: QKV, mask: StreamMask, rest: dict[str, Any]
    ) -> Tensor:
        """(rows, heads, dim) of q (1, heads, rows, dim)."""
        q, k, v = qkv
        layer = self.store.layer((module, turn), k, v)
        heads, shared, dim = q.shape[1], k.shape[1], q.shape[3]
        scaling = rest.get("scaling")
        scaling = dim**-0.5 if scaling is None else scaling
        if is_own(plain) or picks(q.device):
            if is_own(plain) or not (kernels_for(q) and q.itemsize <= 4):
                return self._gathered(plain, module, q, layer, mask, rest)
            from inlay.kernels.gpu.attention import attend

            own, seen = q[0].transpose(0, 1), self._mask(mask)[:, 0, 0]
            return attend(own, *layer, self.reading.table, self.reading.keys, seen, scaling)
        spot = heads, shared, dim
        if spot not in self._bags:
            self._bags[spot] = _Bags.of(self.reading, heads, shared, dim)
        scaled = q[0].transpose(0, 1) * scaling
        return self._bags[spot].attend(scaled.reshape(-1, dim), layer, ~self._mask(mask)[:, 0])

    def _mask(self, mask: StreamMask) -> Tensor:
        """(rows, 1, 1, n * BLOCK): which keys each row's token sees."""
        spot = "singles", self.reading
        if spot not in mask.cache:
            reading = self.reading
            place = torch.arange(reading.table.shape[1] * BLOCK, device=reading.table.device).view(1, 1, 1, -1)
            keys, prefix = (n.view(-1, 1, 1, 1) for n in (reading.keys, reading.prefix))
            found = seen(mask.function, keys - 1, place, prefix, reading.prefixed)
            mask.cache[spot] = found.expand(len(keys), 1, 1, place.shape[-1]) & reading.there[:, None, None]
        return mask.cache[spot]

    def _gathered(
        self, plain: Callable[..., Any], module: nn.Module, q: Tensor, layer: tuple[Tensor, Tensor], mask: StreamMask,
        rest: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        k, v = self.reading.gather(layer)
        rows, shared, dim = len(k), k.shape[1], q.shape[3]
        spot = "singles bias", self.reading, q.dtype
        if spot not in mask.cache:
            found = self._mask(mask)
            lowest = torch.finfo(q.dtype).min
            mask.cache[spot] = torch.zeros_like(found, dtype=q.dtype).masked_fill_(~found, lowest)
        own = q[0].transpose(0, 1).view(rows, shared, -1, dim).transpose(0, 1).reshape(rows * shared, -1, dim)
        keys, values = (x.transpose(0, 1).flatten(0, 1) for x in (k, v))
        made = attended(plain, module, own, keys, values, mask.cache[spot], rest)
        return made.view(shared, rows, -1, v.shape[3]).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class _Bags:
    """For each pair of a query's head and a block of its row: which rows of K^T and of V it goes over.

    `query` is the number of the head of a row that a pair belongs to, `place` where its scores stand among those of
    all rows, which have `width` blocks each.
    """

    query: Tensor
    place: Tensor
    width: int
    keys: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, reading: Reading, heads: int, shared: int, dim: int) -> _Bags:
        rows, width = reading.table.shape
        device = reading.table.device
        blocks = (reading.keys + BLOCK - 1) // BLOCK
        row = torch.arange(rows, device=device).repeat_interleave(blocks * heads)
        # Within a row: head after head, and of each its blocks in order.
        first = torch.cat([blocks.new_zeros(1), (blocks * heads).cumsum(0)[:-1]])
        within = torch.arange(len(row), device=device) - first[row]
        head, block = within // blocks[row], within % blocks[row]
        query = row * heads + head
        base = reading.table[row, block] * shared + head // (heads // shared)
        counts = (blocks * BLOCK).repeat_interleave(heads)
        starts = torch.arange(len(row), device=device) * dim, torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
        return cls(query, query * width + block, width, _bag(base, dim, starts[0]), _bag(base, BLOCK, starts[1]))

    def attend(self, q: Tensor, layer: tuple[Tensor, Tensor], hidden: Tensor) -> Tensor:
        """(rows, heads, dim) of q (rows * heads, dim), scaled; `hidden` (rows, 1, width * BLOCK) is what none sees."""
        keys, values = layer
        rows = len(hidden)
        own = q.index_select(0, self.query)
        index, offsets = self.keys
        scores = bag_sums(keys.view(-1, BLOCK), index, offsets, own.view(-1))
        whole = scores.new_zeros(len(q) * self.width, BLOCK).index_copy_(0, self.place, scores)
        wide = whole.view(rows, -1, self.width * BLOCK)
        weights = _softmax(wide.masked_fill_(hidden, float("-inf")))
        index, offsets = self.values
        taken = weights.view(-1, BLOCK).index_select(0, self.place).view(-1)
        made = bag_sums(values.view(-1, values.shape[3]), index, offsets, taken)
        return made.view(rows, -1, values.shape[3])


def _bag(base: Tensor, size: int, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a table, `size` from each of `base` on, and where each bag of them begins."""
    kind = torch.int32 if int(base.max()) < 2**31 // size - 1 else torch.int64
    return (base[:, None] * size + torch.arange(size, device=base.device)).to(kind).flatten(), offsets.to(kind)


def _softmax(scores: Tensor) -> Tensor:
    return scores.float().softmax(-1).to(scores.dtype) if scores.dtype == torch.bfloat16 else scores.softmax(-1)
