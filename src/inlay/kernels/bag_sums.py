"""Weighted sums of some rows of a table, many at once: `embedding_bag` without its checks, which take as long as a
small layer."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bag_sums"]

_SUM = 0


def bag_sums(table: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """(bags, width): each bag's sum of weights[i] * table[index[i]], over the i from its offset to the next one's.

    `table` is (rows, width), `index` and `weights` are (n,), `offsets` (bags,); a bag with no i gives zeros. The table
    and the weights are of one dtype, the index and the offsets of one kind of integers, and every index is a row.
    """
    return torch.embedding_bag(table, index, offsets, False, _SUM, False, weights, False)[0]
