"""The past of rows that go on: their keys and values in a store of blocks, and where each row stands."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.kernels.picked import picks

from .pages import Pages, StoreFull

__all__ = ["BLOCK", "Past", "Store"]

BLOCK = 32
"""Tokens of a block."""


@dataclass(eq=False)
class Past:
    """One row: its `blocks`, and how many keys of a prefix, virtual tokens and tokens of its own they hold.

    `prompt` is the length of its prompt, `place` before which of its own tokens the virtual ones stand; `memory` is
    what methods found in the prompt and go on from.
    """

    prompt: int
    place: int = 0
    blocks: list[int] = field(default_factory=list)
    prefix: int = 0
    virtual: int = 0
    own: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        """Keys and values that the row has in each layer."""
        return self.prefix + self.virtual + self.own


class Store:
    """Keys and values of all layers in blocks, at most `limit` bytes; tensors are made when a layer first writes.

    A layer's keys are (blocks, heads, dim, BLOCK) and its values (blocks, heads, BLOCK, dim): so a bag of rows gives a
    query's scores, and another what its weights make of the values, without a copy. `token_bytes` is what one token
    takes in all layers. Behind the blocks of rows there is one more, `spare`, that nobody reads.
    """

    def __init__(self, limit: int, token_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        blocks = limit // (token_bytes * BLOCK)
        if blocks < 1:
            raise UsageError(
                f"{limit:,} bytes hold no block of a key-value store, which takes {token_bytes * BLOCK:,}",
                "Give it more memory.",
            )
        self.pages = Pages(int(blocks), BLOCK)
        self.token_bytes, self.dtype, self.device = token_bytes, dtype, device
        self._layers: dict[tuple[nn.Module, int], tuple[Tensor, Tensor]] = {}

    @property
    def spare(self) -> int:
        """The block for rows that only fill a step up."""
        return self.pages.blocks

    @property
    def tokens(self) -> int:
        """How many keys it can hold."""
        return self.pages.blocks * BLOCK

    def check_fits(self, keys: int) -> None:
        """Raises: UsageError where a row of so many keys would not fit even alone."""
        if keys > self.tokens:
            raise UsageError(
                f"a row of {keys} tokens does not fit into a key-value store of {self.tokens}",
                "Give the store more memory, or the row fewer tokens.",
            )

    # ---- rows

    def reserve(self, past: Past, new: int) -> list[int]:
        """Make room for `new` more keys of a row; returns the blocks taken. A block that others hold as well is copied
        before it is written to. Raises: StoreFull; nothing has changed then."""
        needed = -(-(past.keys + new) // BLOCK) - len(past.blocks)
        partial = past.keys % BLOCK and len(past.blocks) * BLOCK > past.keys
        copies = bool(new and partial and self.pages.shared(past.blocks[past.keys // BLOCK]))
        if needed + copies > self.pages.free:
            raise StoreFull(self.pages.blocks)
        taken = [self.pages.take() for _ in range(max(0, needed))]
        if copies:
            at = past.keys // BLOCK
            own = self.pages.take()
            self._copy(past.blocks[at], own)
            self.pages.release([past.blocks[at]])
            past.blocks[at] = own
        past.blocks += taken
        self._clear(taken)
        return taken

    def fork(self, past: Past) -> Past:
        """Another row with the same past, whose blocks the two share until one writes."""
        for block in past.blocks:
            self.pages.hold(block)
        return Past(
            past.prompt, past.place, list(past.blocks), past.prefix, past.virtual, past.own, dict(past.memory)
        )  # fmt: skip

    def release(self, past: Past) -> None:
        """Let go of a row's blocks; it begins anew."""
        self.pages.release(past.blocks)
        past.blocks, past.prefix, past.virtual, past.own, past.memory = [], 0, 0, 0, {}

    def begin(self, past: Past, names: Sequence[Hashable]) -> int:
        """Let a row begin with blocks that are known under the first of `names`; returns how many keys they hold."""
        for name in names:
            block = self.pages.find(name)
            if block is None:
                break
            self.pages.hold(block)
            past.blocks.append(block)
        return len(past.blocks) * BLOCK

    def _clear(self, blocks: Sequence[int]) -> None:
        """What another row has left may not be a number, and zero times that is not one either."""
        if blocks and not picks(self.device):  # there what is behind a row's last key is not even read
            index = torch.tensor(blocks, device=self.device)
            for _, values in self._layers.values():
                values.index_fill_(0, index, 0)

    def _copy(self, source: int, target: int) -> None:
        for keys, values in self._layers.values():
            keys[target], values[target] = keys[source], values[source]

    # ---- layers

    def layer(self, spot: tuple[nn.Module, int], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one attention, for its k and v (1, heads, tokens, dim)."""
        if spot not in self._layers:
            blocks, heads, kind = self.pages.blocks + 1, k.shape[1], {"dtype": k.dtype, "device": k.device}
            # Zeros come from the system untouched: memory is taken where blocks are written.
            self._layers[spot] = (
                torch.zeros(blocks, heads, k.shape[3], BLOCK, **kind),
                torch.zeros(blocks, heads, BLOCK, v.shape[3], **kind),
            )
        return self._layers[spot]
