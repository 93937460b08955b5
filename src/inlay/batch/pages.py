"""Which blocks of a key-value store belong to which rows: numbers alone, no tensors.

Paper: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(arXiv:2309.06180).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from inlay.errors import InlayError

__all__ = ["Pages", "StoreFull"]


class StoreFull(InlayError):
    """No block of a key-value store is free."""

    def __init__(self, blocks: int) -> None:
        super().__init__(
            f"all {blocks} blocks of the key-value store are in use", "Give it more memory, or run fewer rows at once."
        )


class Pages:
    """`blocks` blocks of `size` tokens, each held by any number of rows.

    A block that is full may be `named` by all that its contents depend on. When its last row lets go of it, it is free,
    but stays to be `found` under its name until the room is needed: the one that was let go of longest ago goes first.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        self._free = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks
        self._by_name: dict[Hashable, int] = {}
        self._names: dict[int, Hashable] = {}
        self._resting: OrderedDict[int, None] = OrderedDict()  # named, and held by nobody

    @property
    def free(self) -> int:
        """How many blocks could be taken now."""
        return len(self._free) + len(self._resting)

    def take(self) -> int:
        """A block that nobody holds. Raises: StoreFull."""
        if self._free:
            block = self._free.pop()
        elif self._resting:
            block, _ = self._resting.popitem(last=False)
            self._forget(block)
        else:
            raise StoreFull(self.blocks)
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more row holds a block."""
        self._resting.pop(block, None)
        self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """A row lets go of its blocks; the last ones of it are the first to be taken again."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._names:
                self._resting[block] = None
            else:
                self._free.append(block)

    def shared(self, block: int) -> bool:
        """Whether writing into a block would change what others hold or may find."""
        return self._holders[block] > 1 or block in self._names

    def holders(self, block: int) -> int:
        return self._holders[block]

    # ---- blocks that rows with a common beginning share

    def name(self, block: int, name: Hashable) -> None:
        """Let others find a full block; of two with one name the first is found."""
        if name not in self._by_name:
            self._by_name[name], self._names[block] = block, name

    def find(self, name: Hashable) -> int | None:
        return self._by_name.get(name)

    def forget_all(self) -> None:
        """Let nobody find any block any more."""
        for block in list(self._names):
            self._forget(block)
        self._free += self._resting
        self._resting.clear()

    def _forget(self, block: int) -> None:
        self._by_name.pop(self._names.pop(block), None)
