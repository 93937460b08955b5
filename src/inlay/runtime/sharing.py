"""Names for blocks of a key-value store by all that they depend on: an adapter's content, and the tokens read."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch

from inlay.bank.adapter import Adapter
from inlay.bank.bank import Bank
from inlay.batch.past import BLOCK
from inlay.batch.route import Blend

__all__ = ["Names"]


class Names:
    """The names of one bank's blocks. Two adapters of equal settings and values are one, whatever they are called."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._contents: WeakKeyDictionary[Adapter, bytes] = WeakKeyDictionary()

    def root(self, blend: Blend, scope: str = "") -> bytes:
        """What all blocks of a row depend on. Rows of different `scope` share nothing."""
        digest = hashlib.blake2b(repr(scope).encode(), digest_size=16)
        for name, weight in blend:
            digest.update(self._content(self.bank.adapters[name]) + repr(weight).encode())
        return digest.digest()

    def blocks(self, root: bytes, ahead: int, ids: Sequence[int], first: int = 0) -> Iterator[bytes]:
        """The names of the full blocks of a row with `ahead` keys before its tokens `ids`; a name holds the one before
        it. The chain goes on from `root`, the name of the block before the `first`."""
        for block in range(first, (ahead + len(ids)) // BLOCK):
            start, stop = (max(0, n * BLOCK - ahead) for n in (block, block + 1))
            own = array("q", ids[start:stop]).tobytes()
            root = hashlib.blake2b(root + own, digest_size=16).digest()
            yield root

    def _content(self, adapter: Adapter) -> bytes:
        if adapter not in self._contents:
            digest = hashlib.blake2b(digest_size=16)
            for part in adapter.parts:
                digest.update(f"{type(part.method).__qualname__} {part.method!r} {[*part.sites]}".encode())
                for path, own in part.params.items():
                    for name, value in own.items():
                        digest.update(f"{path} {name} {tuple(value.shape)}".encode())
                        flat = value.detach().cpu().contiguous().flatten()
                        digest.update(flat.view(torch.uint8).numpy().tobytes())
            for used in sorted(adapter.uses):
                digest.update(self._content(self.bank.adapters[used]))
            self._contents[adapter] = digest.digest()
        return self._contents[adapter]
