"""A frozen linear layer over as many rows as are written at once, on a CPU, by the quickest of four ways.

    y = W x = sum over i of x[i] W^T[i]

1. One row or two are weighted sums of the rows of W^T, which `embedding_bag` reads at the speed of memory: in float32
   two to three times as fast as a product of a matrix and a vector, in bfloat16 one and a half times. It needs W^T
   beside W, and AVX-512; or a single row of float32 and two threads.
2. Two to eight rows of float32 are faster as W x^T than as x W^T; on AMD without AVX-512 and with threads, up to 64.
3. Large weights of float32 go through oneDNN on AMD without AVX-512, 1.4 to 2.7 times as fast as through MKL there.
4. What is left is torch's own.

Measured by benchmarks/decode_linear.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from .bag_sums import bag_sums
from .processor import amd, has_onednn, wide_vectors

__all__ = ["DecodeLinear", "onednn", "turned"]

BAGS = 2
"""Rows up to which bags are faster; without AVX-512 only one."""
TURNED, TURNED_AVX2 = 8, 64
"""Rows up to which W x^T is faster in float32 and float64; on AMD without AVX-512, where there are threads."""
WIDE = 1024
"""Columns of a bag: so many sums stay in the fastest cache."""
LARGE = 2**21
"""Values of a weight from which oneDNN is faster than MKL."""


class DecodeLinear:
    """The forward of one frozen linear layer of a CPU; with `copies` it may hold W^T, from its first single row on."""

    def __init__(self, layer: nn.Linear, copies: bool) -> None:
        self.layer, self.copies = layer, copies
        self._turned: Tensor | None = None
        self._of: tuple[int, int] | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        """y (..., out) of x (..., in); None where torch's own is as quick, and for x of another dtype than W's."""
        weight = self.layer.weight
        rows = x.numel() // x.shape[-1]
        if x.dtype != weight.dtype or not rows:
            return None
        if _onednn_is_quicker(rows, weight):
            return onednn(x, weight, self.layer.bias)
        if rows <= BAGS and self.copies and _bags_are_quicker(rows, weight):
            made = self._bags(x.reshape(rows, -1), weight)
        elif 1 < rows <= _turned() and weight.dtype in (torch.float32, torch.float64):
            made = turned(x.reshape(rows, -1), weight)
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


def turned(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T (rows, out) for x (rows, in), as W x^T."""
    return (weight @ x.t()).t().contiguous()


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias (..., out) for x (..., in), by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _mkl_is_slow() -> bool:
    return amd() and not wide_vectors()


def _turned() -> int:
    return TURNED_AVX2 if _mkl_is_slow() and torch.get_num_threads() > 1 else TURNED


def _onednn_is_quicker(rows: int, weight: Tensor) -> bool:
    if weight.dtype != torch.float32 or weight.numel() < LARGE or not weight.is_contiguous():
        return False
    many = rows > TURNED or (rows == 1 and torch.get_num_threads() > 1)
    return many and _mkl_is_slow() and has_onednn()


def _bags_are_quicker(rows: int, weight: Tensor) -> bool:
    if weight.shape[0] % 2:
        return False
    return wide_vectors() or (rows == 1 and weight.dtype == torch.float32 and torch.get_num_threads() > 1)


@lru_cache(256)
def _parts(out: int) -> int:
    """Into how many bags the sums of a row are cut: two threads at least have work, and each bag's sums stay near."""
    return next((n for n in range(2, out, 2) if out % n == 0 and out // n <= WIDE), 2)


@lru_cache(256)
def _index(rows: int, width: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each row and each part of its sums: which rows of W^T (width * parts, out / parts) they go over."""
    whole = torch.arange(width * parts, dtype=torch.int32, device=device).view(width, parts).t().reshape(-1)
    return whole.repeat(rows), torch.arange(rows * parts, dtype=torch.int32, device=device) * width
