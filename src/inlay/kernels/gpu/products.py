"""`inlay.kernels.picked.Picked` in two kernels, which read each vector's factors where they lie.

Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving" (arXiv:2310.18547), has the idea.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.bags import RANK

__all__ = ["add_high", "low"]

LONGEST, SHORTEST = 2048, 256
"""Numbers of x that one program takes at once, at most and at least."""


def low(x: Tensor, downs: Tensor, numbers: Tensor) -> Tensor:
    """(vectors, units, parts, 8 n): D x, of x (vectors, in), cut into parts so that more of a GPU is at work."""
    vectors, units = numbers.shape
    (width, columns), x = (x.shape[1], downs.shape[1]), x.contiguous()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    block = min(max(triton.next_power_of_2(width), SHORTEST), LONGEST)
    parts = triton.cdiv(width, block)
    made = torch.empty(vectors, units, parts, columns, dtype=wide, device=x.device)
    _low[vectors * units, columns // RANK, parts](
        x, downs, numbers, made, width, units, columns, parts, RANK, block, made.dtype == torch.float64, num_warps=8
    )
    return made


def add_high(y: Tensor, low: Tensor, ups: Tensor, numbers: Tensor, layer: int) -> None:
    """Add U D x to y (vectors, out), contiguous; see `low`."""
    vectors, units, parts, columns = low.shape
    width, block = y.shape[1], 256
    _add_high[vectors, triton.cdiv(width, block)](
        y, low, ups, numbers, width, layer * RANK, columns, units, parts, RANK, block, num_warps=4
    )


@triton.jit
def _low(
    x, downs, numbers, made, width, units, columns, parts, RANK: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    pair, layer, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, rank = part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, RANK)
    there = row < width
    wide = tl.float64 if EXACT else tl.float32
    own = tl.load(x + (pair // units) * width + row, mask=there, other=0).to(wide)
    slot = tl.load(numbers + pair)
    spots = downs + (slot * width + row)[:, None] * columns + layer * RANK + rank[None, :]
    factors = tl.load(spots, mask=(there & (slot > 0))[:, None], other=0).to(wide)
    total = tl.sum(own[:, None] * factors, 0)
    tl.store(made + (pair * parts + part) * columns + layer * RANK + rank, total)


@triton.jit
def _add_high(
    y, low, ups, numbers, width, first, columns, units, PARTS: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    found = tl.load(y + vector * width + column, mask=there, other=0)
    total = found.to(low.dtype.element_ty)
    for unit in range(0, units):
        pair = vector * units + unit
        slot = tl.load(numbers + pair)
        for rank in tl.static_range(RANK):
            own = tl.load(low + pair * PARTS * columns + first + rank)
            for part in tl.static_range(1, PARTS):
                own += tl.load(low + (pair * PARTS + part) * columns + first + rank)
            factors = tl.load(ups + (slot * RANK + rank) * width + column, mask=there & (slot > 0), other=0)
            total += own * factors.to(low.dtype.element_ty)
    tl.store(y + vector * width + column, total.to(found.dtype), mask=there)
