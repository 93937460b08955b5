"""A linear layer over one row or a few on a CPU, where libraries made for many reach a third of the memory's speed.

    y = W x = sum over i of x[i] W^T[i]

One row is a weighted sum of the rows of W^T, which `embedding_bag` reads at the speed of memory: two to three times as
fast as a product of a matrix and a vector in float32, one and a half times in bfloat16. It needs W^T beside W. Two to
eight rows of float32 are faster as W x^T than as x W^T. Measured by benchmarks/decode.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from .bag_sums import bag_sums

__all__ = ["FewRows"]

BAGS = 2
"""Rows up to which bags are faster."""
TURNED = 8
"""Rows up to which W x^T is faster in float32 and float64."""
WIDE = 1024
"""Columns of a bag: so many sums stay in the fastest cache."""


class FewRows:
    """The forward of one frozen linear layer of a CPU; with `copies` it holds W^T, from its first single row on."""

    def __init__(self, layer: nn.Linear, copies: bool) -> None:
        self.layer, self.copies = layer, copies
        self._turned: Tensor | None = None
        self._of: tuple[int, int] | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        """y (..., out) of x (..., in); None where there are too many rows, or others than W's dtype."""
        weight = self.layer.weight
        rows = x.numel() // x.shape[-1]
        if x.dtype != weight.dtype or rows > TURNED or not rows:
            return None
        if rows <= BAGS and self.copies and weight.shape[0] % 2 == 0:
            made = self._bags(x.reshape(rows, -1), weight)
        elif rows > 1 and weight.dtype in (torch.float32, torch.float64):
            made = (weight @ x.reshape(rows, -1).t()).t().contiguous()
        else:
            return None
        if self.layer.bias is not None:
            made += self.layer.bias
        return made.view(*x.shape[:-1], made.shape[-1])

    def _bags(self, x: Tensor, weight: Tensor) -> Tensor:
        version = weight.data_ptr(), weight._version
        if self._turned is None or self._of != version:  # merging an adapter writes into it
            self._turned, self._of = weight.detach().t().contiguous(), version
        parts = _parts(weight.shape[0])
        index, offsets = _index(len(x), weight.shape[1], parts, x.device)
        if len(x) > 1:
            each = x.repeat_interleave(parts, 0).view(-1)
        else:
            each = torch.cat((x,) * parts).view(-1) if parts == 2 else x.expand(parts, -1).reshape(-1)
        table = self._turned.view(weight.shape[1] * parts, -1)
        return bag_sums(table, index, offsets, each).view(len(x), -1)


@lru_cache(256)
def _parts(out: int) -> int:
    """Into how many bags the sums of a row are cut: two threads at least have work, and each bag's sums stay near."""
    return next((n for n in range(2, out, 2) if out % n == 0 and out // n <= WIDE), 2)


@lru_cache(256)
def _index(rows: int, width: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each row and each part of its sums: which rows of W^T (width * parts, out / parts) they go over."""
    whole = torch.arange(width * parts, dtype=torch.int32, device=device).view(width, parts).t().reshape(-1)
    return whole.repeat(rows), torch.arange(rows * parts, dtype=torch.int32, device=device) * width
