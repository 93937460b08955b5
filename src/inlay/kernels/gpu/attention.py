"""Attention of single tokens over the blocks of a key-value store, read where they lie.

Kwon et al. 2023 (arXiv:2309.06180) for the blocks, Dao et al. 2022 (arXiv:2205.14135) for the running softmax.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attend"]


def attend(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, counts: Tensor, seen: Tensor, scaling: float
) -> Tensor:
    """(rows, heads, value dim) of q (rows, heads, dim), in float32 or half precision.

    keys (blocks, shared heads, dim, BLOCK) and values (blocks, shared heads, BLOCK, value dim) are a store's; `table`
    (rows, n) int64 names the blocks of each row, whose first `counts` (rows,) keys are there; of these, `seen` (rows, n
    * BLOCK) bool are seen.
    """
    rows, heads, dim = q.shape
    shared, block, width = keys.shape[1], keys.shape[3], values.shape[3]
    group = heads // shared
    made = torch.empty(rows, heads, width, dtype=q.dtype, device=q.device)
    _attend[rows, shared](
        q.contiguous(), keys, values, table, counts, seen.contiguous(), made, scaling, table.stride(0),
        counts.stride(0), table.stride(1), seen.shape[1], shared, group, dim, width, block,
        max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(dim)),
        max(16, triton.next_power_of_2(width)),
    )  # fmt: skip
    return made


@triton.jit
def _attend(
    q, keys, values, table, counts, seen, made, scaling, table_row, counts_row, table_column, seen_row,
    SHARED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, DIMS: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query, dim = tl.arange(0, QUERIES), tl.arange(0, DIMS)
    place, wide = tl.arange(0, BLOCK), tl.arange(0, WIDTHS)
    first = row * SHARED * GROUP + head * GROUP
    mine = query < GROUP
    own = tl.load(q + (first + query)[:, None] * DIM + dim[None, :], mask=mine[:, None] & (dim < DIM)[None, :], other=0)
    best = tl.full((QUERIES,), -1.0e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, WIDTHS), tl.float32)
    blocks = tl.cdiv(tl.load(counts + row * counts_row), BLOCK)
    for number in range(0, blocks):
        base = tl.load(table + row * table_row + number * table_column) * SHARED + head
        there = tl.load(seen + row * seen_row + number * BLOCK + place) != 0
        k = tl.load(
            keys + (base * DIM + dim)[:, None] * BLOCK + place[None, :],
            mask=(dim < DIM)[:, None] & there[None, :], other=0,
        )  # fmt: skip
        scores = tl.dot(own, k, input_precision="ieee").to(tl.float32) * scaling
        scores = tl.where(there[None, :], scores, -1.0e30)
        top = tl.maximum(best, tl.max(scores, 1))
        weights = tl.where(there[None, :], tl.exp(scores - top[:, None]), 0.0)
        left = tl.exp(best - top)
        v = tl.load(
            values + (base * BLOCK + place)[:, None] * WIDTH + wide[None, :],
            mask=there[:, None] & (wide < WIDTH)[None, :], other=0,
        )  # fmt: skip
        sums = sums * left[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee").to(tl.float32)
        total = total * left + tl.sum(weights, 1)
        best = top
    result = sums / total[:, None]
    tl.store(
        made + (first + query)[:, None] * WIDTH + wide[None, :], result.to(made.dtype.element_ty),
        mask=mine[:, None] & (wide < WIDTH)[None, :],
    )  # fmt: skip
