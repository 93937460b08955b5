"""Names for blocks of a key-value store by all that they depend on: an adapter's content, and the tokens read."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.bank.adapter import Adapter
from inlay.bank.bank import Bank
from inlay.batch.past import BLOCK
from inlay.batch.route import Blend

__all__ = ["Name", "Names", "Root"]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLE = 8
"""Values of a parameter that are looked at before all of them are."""


class Content:
    """An adapter's settings and values as they were when a row began.

    Two are equal where all of that is. A sample tells most of them apart; what is hashed whole, once, is only what may
    be equal to another: so rows of adapters that differ, or of one alone, cost no pass over their parameters.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.stamp, self.sample = stamp_of(adapter), _sample(adapter)
        self._adapter: Adapter | None = adapter
        self._whole: bytes | None = None

    @property
    def whole(self) -> bytes | None:
        """A digest of all values; None where they have changed."""
        if self._whole is None and self._adapter is not None and stamp_of(self._adapter) == self.stamp:
            self._whole = _digest(self._adapter)
        return self._whole

    def settle(self) -> None:
        """Let go of the adapter, and know its values by their digest."""
        self._whole, self._adapter = self.whole, None

    def lose(self) -> None:
        """Be equal to no other any more: the adapter's values have changed."""
        self._adapter = self._whole = None

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Content) and self.sample == other.sample
            and self.whole is not None and self.whole == other.whole
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash(self.sample)


@dataclass(frozen=True)
class Root:
    """What all blocks of a row depend on beside its tokens: its adapters in their order, those that they use behind
    them, their weights, and how often the base has changed. Rows of different `scope` share nothing."""

    scope: str
    merges: int
    weights: tuple[float | None, ...]
    contents: tuple[Content, ...]


Name = tuple[Root, bytes]
"""Of a full block: the row's root, and a digest of all tokens up to the block's end."""


class Names:
    """The names of one bank's blocks. Two adapters of equal settings and values are one, whatever they are called."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._contents: dict[Adapter, Content] = {}
        self._merges = bank.merges

    def renew(self, blend: Blend) -> bool:
        """See whether the base, or adapters of a row, have changed since the last one; what was read with them is
        found no more."""
        changed = self._merges != self.bank.merges
        self._merges = self.bank.merges
        for name, _ in blend:
            for adapter in self._with_used(self.bank.adapters[name]):
                known = self._contents.get(adapter)
                if known is not None and known.stamp != stamp_of(adapter):
                    self._contents.pop(adapter).lose()
                    changed = True
        return changed

    def root(self, blend: Blend, scope: str = "") -> Root:
        """What all blocks of a row depend on, with its adapters as they were at the last `renew`."""
        weights: list[float | None] = []
        contents: list[Content] = []
        for name, weight in blend:
            own = self._with_used(self.bank.adapters[name])
            weights += [weight, *[None] * (len(own) - 1)]
            contents += [self._content(adapter) for adapter in own]
        return Root(scope, self._merges, tuple(weights), tuple(contents))

    def blocks(self, root: Root, ahead: int, ids: Sequence[int], done: Sequence[Name] = ()) -> Iterator[Name]:
        """The names of the full blocks of a row with `ahead` keys before its tokens `ids`, behind those that are
        `done`; each depends on the one before it."""
        chain = done[-1][1] if done else b""
        for block in range(len(done), (ahead + len(ids)) // BLOCK):
            start, stop = (max(0, n * BLOCK - ahead) for n in (block, block + 1))
            own = array("q", ids[start:stop]).tobytes()
            chain = hashlib.blake2b(chain + own, digest_size=16).digest()
            yield root, chain

    def forget(self) -> None:
        """Let go of adapters that the bank has no longer; their content is still known by its digest."""
        there = {own for adapter in self.bank.adapters.values() for own in self._with_used(adapter)}
        for adapter in [adapter for adapter in self._contents if adapter not in there]:
            self._contents.pop(adapter).settle()

    def _content(self, adapter: Adapter) -> Content:
        if adapter not in self._contents:
            self._contents[adapter] = Content(adapter)
        return self._contents[adapter]

    def _with_used(self, adapter: Adapter) -> list[Adapter]:
        """An adapter, and all that it is over."""
        found = [adapter]
        for name in sorted(adapter.uses):
            found += self._with_used(self.bank.adapters[name])
        return found


def stamp_of(adapter: Adapter) -> tuple[Any, ...]:
    """Which tensors an adapter has, and the sum of the bits of each: torch counts no change by a fused optimizer. While
    it is trained as few flat tensors, those are looked at that the others are views of. Nothing is looked at where its
    values are fixed."""
    if adapter.fixed:
        return ()
    tensors = [flat.parameter for flat in adapter.laid] or _values(adapter)
    sums = [_bits(p).sum(dtype=torch.int64) for p in tensors if p.numel()]
    return *map(id, _values(adapter)), *(torch.stack(sums).tolist() if sums else ())


def _bits(value: Tensor) -> Tensor:
    """(n,): the values as whole numbers of the same width."""
    flat = value.detach().contiguous().flatten()
    return flat.view(INTEGERS[flat.itemsize]) if flat.is_floating_point() else flat


def _values(adapter: Adapter) -> list[Tensor]:
    return [value for part in adapter.parts for own in part.params.values() for value in own.values()]


def _sample(adapter: Adapter) -> bytes:
    """The last values of the first and the last tensors."""
    values = _values(adapter)
    some = [value.detach().flatten()[-SAMPLE:].double() for value in (*values[:2], *values[-2:])]
    return torch.cat(some).cpu().numpy().tobytes() if some else b""


def _digest(adapter: Adapter) -> bytes:
    """Of an adapter's settings, places and values."""
    digest = hashlib.blake2b(digest_size=16)
    for part in adapter.parts:
        digest.update(f"{type(part.method).__qualname__} {part.method!r} {[*part.sites]}".encode())
        for path, own in (*part.params.items(), ("constants", part.constants)):
            for name, value in own.items():
                digest.update(f"{path} {name} {tuple(value.shape)}".encode())
                flat = value.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.digest()
