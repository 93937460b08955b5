"""Which tensor code is the fastest for many low-rank adapters at once: the candidates behind the kernels, paired.

Candidates run in one process, in turn, and those that decode on weights that no cache holds. The table gives medians in
microseconds for one layer of SmolLM2-135M's shapes, and beside them the time as a share of the base's own products. It
needs torch alone: nothing of Inlay is measured, so that a kernel can be chosen before it is written.

    python benchmarks/kernel_speed.py [--dtype bfloat16] [--rows 32] [--rounds 7]

decode: one token a row, and a LoRA of its own for each row, of one rank (8) or of ranks 4, 8, 16 and 32
train:  1,024 tokens of 16 adapters in spans of 20 to 110 tokens, forward and backward
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

__all__ = ["alternating", "bandwidth"]

SITES = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
"""Inputs and outputs of q, k, v, o, gate, up and down."""
COPIES = 10
"""Layers with weights of their own, so that each is read from memory."""
UNIT = 8
"""Columns of a piece that an adapter of any rank is cut into."""
Work = Callable[[], object]


def alternating(candidates: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate; all run once, and then in turn."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, work in candidates.items():
            begun = time.perf_counter()
            work()
            if turn:
                taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(own) for name, own in taken.items()}


def bandwidth() -> float:
    """Bytes a second that a sum over far more than the caches hold reads."""
    ones = torch.ones(1 << 27)
    return ones.nbytes / alternating({"sum": ones.sum}, 5)["sum"]


def bag(table: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of `table`, one for each start in `index`."""
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights.reshape(-1))


class Decode:
    """`rows` tokens, each of an adapter of its own; every site of every layer in each way."""

    def __init__(self, ranks: Sequence[int], dtype: torch.dtype) -> None:
        self.ranks, self.rows, self.dtype = ranks, len(ranks), dtype
        self.x = {width: torch.randn(self.rows, width, dtype=dtype) for width in (576, 1536)}
        self.y = {width: torch.zeros(self.rows, width, dtype=dtype) for width in (192, 576, 1536)}
        self.weights = [[torch.randn(out, into, dtype=dtype) for into, out in SITES] for _ in range(COPIES)]

    def tables(self, count: int, rank: int) -> list[list[tuple[Tensor, Tensor]]]:
        """A (count, in, rank) and B (count, rank, out) for every site of every layer."""
        made = lambda *shape: torch.randn(*shape, dtype=self.dtype)  # noqa: E731
        return [[(made(count, i, rank), made(count, rank, o)) for i, o in SITES] for _ in range(COPIES)]

    def base(self) -> None:
        for layer in self.weights:
            for (into, _), weight in zip(SITES, layer, strict=True):
                F.linear(self.x[into], weight)

    def padded(self, vector_first: bool = True) -> Work:
        """bmm of all rows, ranks filled up to the widest; the vector stands first or last."""
        tables = self.tables(self.rows, max(self.ranks))

        def first(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> None:
            y[:, None].baddbmm_(torch.bmm(x[:, None], a), b)

        def last(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> None:
            y[..., None].baddbmm_(
                b.view(len(b), -1, b.shape[1]), torch.bmm(a.view(len(a), -1, a.shape[1]), x[..., None])
            )

        return self._all(tables, first if vector_first else last)

    def loop(self) -> Work:
        tables = self.tables(self.rows, max(self.ranks))

        def one(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> None:
            for row, rank in enumerate(self.ranks):
                y[row : row + 1].addmm_(x[row : row + 1] @ a[row, :, :rank], b[row, :rank])

        return self._all(tables, one)

    def bags(self) -> Work:
        """Sums over the rows of tables; each adapter is cut into pieces of UNIT columns, the last one filled up."""
        pieces = torch.tensor([-(-rank // UNIT) for rank in self.ranks])
        count, row = int(pieces.sum()), torch.repeat_interleave(torch.arange(self.rows), pieces)
        whole = {width: torch.arange(count * width, dtype=torch.int32) for width in (UNIT, 576, 1536)}
        starts = {width: whole[width][::width].contiguous() for width in (576, 1536)}
        behind = ((pieces.cumsum(0) - pieces) * UNIT).int()
        tables = self.tables(count, UNIT)

        def one(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> None:
            width = x.shape[1]
            low = bag(a.view(-1, UNIT), whole[width], starts[width], x.index_select(0, row))
            y.add_(bag(b.view(-1, b.shape[2]), whole[UNIT], behind, low))

        return self._all(tables, one)

    def _all(self, tables: list[list[tuple[Tensor, Tensor]]], one: Callable[..., None]) -> Work:
        def work() -> None:
            for layer in tables:
                for (into, out), (a, b) in zip(SITES, layer, strict=True):
                    one(self.x[into], self.y[out], a, b)

        return work


def decode(ranks: Sequence[int], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    made = Decode(ranks, dtype)
    return alternating(
        {
            "the base's own": made.base, "bmm, vector first": made.padded(), "bmm, vector last": made.padded(False),
            "embedding_bag": made.bags(), "a loop of mm": made.loop(),
        },
        rounds,
    )  # fmt: skip


class Train:
    """Spans of tokens, each of an adapter of its own; forward and backward of every site of a layer in each way."""

    def __init__(self, ranks: Sequence[int], lengths: Sequence[int], dtype: torch.dtype) -> None:
        self.ranks, self.lengths, self.dtype = ranks, lengths, dtype
        ends = list(itertools.accumulate(lengths))
        self.spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        widths = (192, 576, 1536)
        self.x, self.grad, self.y, self.grad_x = (
            {width: torch.randn(ends[-1], width, dtype=dtype) for width in widths} for _ in range(4)
        )
        self.weights = [torch.randn(out, into, dtype=dtype) for into, out in SITES]

    def base(self) -> None:
        for (into, out), weight in zip(SITES, self.weights, strict=True):
            _ = F.linear(self.x[into], weight), self.grad[out] @ weight

    def loop(self) -> Work:
        """addmm_ for each span; A (r, in), B (r, out)."""
        tables = [
            [(torch.randn(r, i, dtype=self.dtype), torch.randn(r, o, dtype=self.dtype)) for r in self.ranks]
            for i, o in SITES
        ]

        def work() -> None:
            for (into, out), adapters in zip(SITES, tables, strict=True):
                for span, (a, b) in zip(self.spans, adapters, strict=True):
                    x, grad = self.x[into][span], self.grad[out][span]
                    low = x @ a.T
                    self.y[out][span].addmm_(low, b)
                    grad_low = grad @ b.T
                    self.grad_x[into][span].addmm_(grad_low, a)
                    _ = grad_low.T @ x, low.T @ grad

        return work

    def buckets(self, bounds: Sequence[int]) -> Work:
        """bmm for each bucket of ranks, whose spans are gathered and filled up to the longest with their last token."""
        chosen = [[n for n, r in enumerate(self.ranks) if low < r <= high] for low, high in itertools.pairwise(bounds)]
        groups = [(self._gathered(group), max(self.ranks[n] for n in group), group) for group in chosen if group]
        made = lambda *shape: torch.randn(*shape, dtype=self.dtype)  # noqa: E731
        tables = [[(made(len(g), r, i), made(len(g), r, o)) for _, r, g in groups] for i, o in SITES]

        def work() -> None:
            for (into, out), sizes in zip(SITES, tables, strict=True):
                for (index, _, group), (a, b) in zip(groups, sizes, strict=True):
                    x, grad = self.x[into][index], self.grad[out][index]  # (adapters, longest, width)
                    low = torch.bmm(x, a.mT)
                    self._put(self.y[out], torch.bmm(low, b), group)
                    grad_low = torch.bmm(grad, b.mT)
                    self._put(self.grad_x[into], torch.bmm(grad_low, a), group)
                    _ = torch.bmm(grad_low.mT, x), torch.bmm(low.mT, grad)

        return work

    def _gathered(self, group: Sequence[int]) -> Tensor:
        steps = torch.arange(max(self.lengths[n] for n in group))
        return torch.stack([steps.clamp(max=self.lengths[n] - 1) + self.spans[n].start for n in group])

    def _put(self, into: Tensor, padded: Tensor, group: Sequence[int]) -> None:
        for row, n in enumerate(group):
            into[self.spans[n]].add_(padded[row, : self.lengths[n]])


def train(ranks: Sequence[int], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    draw = random.Random(0)
    lengths = [draw.randint(20, 110) for _ in ranks]
    made = Train(ranks, lengths, dtype)
    bounds = {"one bucket": (0, 64), "buckets to 8, 16, 32, 64": (0, 8, 16, 32, 64)}
    candidates: dict[str, Work] = {"the base's own": made.base, "a loop of mm": made.loop()}
    candidates |= {f"bmm, {name}": made.buckets(limits) for name, limits in bounds.items()}
    return {name: seconds * COPIES for name, seconds in alternating(candidates, rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="default: both")
    parser.add_argument("--rows", type=int, default=32, help="rows that decode (default: 32)")
    parser.add_argument("--rounds", type=int, default=7)
    a = parser.parse_args()
    several = [4, 4, 8, 8, 8, 12, 16, 16, 16, 24, 32, 32, 8, 8, 16, 64]
    mixed = [(4, 8, 16, 32)[4 * n // a.rows] for n in range(a.rows)]
    table = Table("dtype", "work", "how", "µs a layer", "share of the base's own")
    for name in a.dtype or ["float32", "bfloat16"]:
        dtype = getattr(torch, name)
        for work, made in {
            "decode, rank 8": decode([8] * a.rows, dtype, a.rounds),
            "decode, ranks 4 to 32": decode(mixed, dtype, a.rounds),
            "train, rank 8": train([8] * 16, dtype, a.rounds), "train, ranks 4 to 64": train(several, dtype, a.rounds),
        }.items():  # fmt: skip
            whole = made["the base's own"]
            for how, seconds in made.items():
                table.add_row(name, work, how, f"{seconds / COPIES * 1e6:,.0f}", f"{seconds / whole:.2f}")
            table.add_section()
    Console(width=110, highlight=False).print(table)
    print(f"reads {bandwidth() / 1e9:.0f} GB/s with {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
