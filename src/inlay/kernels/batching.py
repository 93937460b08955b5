"""Which low-rank products of one stream are computed as one batched product, and where their tokens lie in it.

Products of many tokens cost little more than their arithmetic, so that there only equal neighbours pay; every product
in half precision costs some 20 us, and so does a kernel's start on an accelerator: there products of like ranks are
padded to one (benchmarks/kernel_speed.py has the figures). Padding repeats a product's own tokens: no token meets
another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .gather import padded_index

__all__ = ["Block", "batched", "pads", "stacked"]

RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks that products are padded to."""
WASTE = 2.0
"""How many times the tokens of a block may be what they are without padding."""

SMALL, SMALL_HALF = 64, 256
"""Mean tokens of a product up to which a processor is faster with one padded product, in float32 (where it is the
threads that gain: each takes whole products) and in half precision."""

Spans = tuple[tuple[int, int], ...]
Shape = tuple[Spans, int]
"""The spans of one product, and its rank; rank 0 for one that has to stay alone."""


@dataclass(frozen=True, eq=False)
class Block:
    """The products `members`, of `size` tokens and `rank` each after padding.

    The tokens are `start:stop` in order where nothing is padded. Else `index` (K * size,) says which token stands
    where, `home` where each of `tokens` (all of the members' own) is, and `padding` which places are none.
    """

    members: tuple[int, ...]
    rank: int
    size: int
    start: int = 0
    stop: int = 0
    index: Tensor | None = None
    home: Tensor | None = None
    tokens: Tensor | None = None
    padding: Tensor | None = None

    def gather(self, x: Tensor) -> Tensor:
        """x (T, width) as (K, size, width)."""
        own = x[self.start : self.stop] if self.index is None else x.index_select(0, self.index)
        return own.view(len(self.members), self.size, x.shape[1])

    def gather_gradient(self, grad: Tensor) -> Tensor:
        """The same, with zeros for padding, which must count nowhere."""
        own = self.gather(grad)
        if self.padding is not None and len(self.padding):
            own.view(-1, grad.shape[1]).index_fill_(0, self.padding, 0)
        return own

    def add(self, y: Tensor, made: Tensor) -> None:
        """Add `made` (K, size, width) to its tokens of y (T, width)."""
        flat = made.flatten(0, 1)
        if self.home is None or self.tokens is None:
            y[self.start : self.stop].add_(flat)
        else:
            y.index_add_(0, self.tokens, flat.index_select(0, self.home))


def pads(x: Tensor, shapes: Sequence[Shape]) -> bool:
    """Whether products of unlike ranks and sizes are better one padded product than several of their own."""
    if x.is_cuda:
        return True
    tokens = sum(map(_size, shapes)) / max(1, len(shapes))
    if x.dtype in (torch.bfloat16, torch.float16):
        return tokens <= SMALL_HALF
    return tokens <= SMALL and torch.get_num_threads() > 1


def stacked(parts: Sequence[Tensor], size: int, dim: int) -> Tensor:
    """K matrices as one tensor (K, ...), each filled up with zeros to `size` along `dim`."""
    if all(part.shape[dim] == size for part in parts):
        return torch.stack(list(parts))
    shape = [len(parts), *parts[0].shape]
    shape[dim + 1] = size
    whole = parts[0].new_zeros(shape)
    places = [own.narrow(dim, 0, part.shape[dim]) for own, part in zip(whole, parts, strict=True)]
    torch._foreach_copy_(places, list(parts))  # pyright: ignore
    return whole


@lru_cache(256)
def batched(shapes: tuple[Shape, ...], pad: bool, device: torch.device) -> tuple[tuple[int, ...], tuple[Block, ...]]:
    """The numbers of the products that are computed one by one, and the blocks of the others; with `pad`, products of
    unlike ranks and sizes go into one block."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (spans, rank) in enumerate(shapes):
        if rank:
            tokens = sum(stop - start for start, stop in spans)
            key = (next((r for r in RANKS if r >= rank), rank),) if pad else (rank, tokens)
            groups.setdefault(key, []).append(number)
    blocks = [block for key, own in groups.items() for block in _blocks(shapes, own, key[0], pad, device)]
    taken = {number for block in blocks for number in block.members}
    return tuple(n for n in range(len(shapes)) if n not in taken), tuple(blocks)


def _blocks(shapes: Sequence[Shape], members: list[int], rank: int, pad: bool, device: torch.device) -> list[Block]:
    if not pad:
        runs = _runs(shapes, members)
        return [_plain(shapes, run, rank) for run in runs if len(run) > 1]
    rank = max(shapes[n][1] for n in members)
    found: list[list[int]] = []
    for number in sorted(members, key=lambda n: -_size(shapes[n])):
        if found and _waste(shapes, [*found[-1], number]) <= WASTE:
            found[-1].append(number)
        else:
            found.append([number])
    return [_padded(shapes, sorted(own), rank, device) for own in found if len(own) > 1]


def _size(shape: Shape) -> int:
    return sum(stop - start for start, stop in shape[0])


def _waste(shapes: Sequence[Shape], members: Sequence[int]) -> float:
    sizes = [_size(shapes[n]) for n in members]
    return max(sizes) * len(sizes) / max(1, sum(sizes))


def _runs(shapes: Sequence[Shape], members: Sequence[int]) -> list[list[int]]:
    """Members of one span each, in runs whose spans are neighbours."""
    runs: list[list[int]] = []
    for number in members:
        spans = shapes[number][0]
        if len(spans) != 1:
            continue
        if runs and shapes[runs[-1][-1]][0][-1][1] == spans[0][0]:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _plain(shapes: Sequence[Shape], run: Sequence[int], rank: int) -> Block:
    first, last = shapes[run[0]][0][0], shapes[run[-1]][0][0]
    return Block(tuple(run), rank, first[1] - first[0], first[0], last[1])


def _padded(shapes: Sequence[Shape], members: Sequence[int], rank: int, device: torch.device) -> Block:
    runs = _runs(shapes, members)
    if len({_size(shapes[n]) for n in members}) == 1 and len(runs) == 1 and len(runs[0]) == len(members):
        return _plain(shapes, members, rank)
    own = [torch.cat([torch.arange(start, stop) for start, stop in shapes[n][0]]) for n in members]
    tokens, sizes = torch.cat(own), torch.tensor([len(t) for t in own])
    index, real = padded_index(sizes.cumsum(0) - sizes, sizes)
    places = real.flatten()
    return Block(
        tuple(members), rank, int(sizes.max()), index=tokens[index.flatten()].to(device),
        home=places.nonzero()[:, 0].to(device), tokens=tokens.to(device), padding=(~places).nonzero()[:, 0].to(device),
    )  # fmt: skip
