"""Gathers tokens of a stream into padded blocks and scatters them back; gradients go the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Gather", "Scatter", "padded_index"]


def padded_index(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Spans of `lengths` (b,) from `starts` (b,) as rows (b, longest): which token stands where, and which places are
    real. Padding repeats its own span's first token."""
    step = torch.arange(int(lengths.max()))[None]
    real = step < lengths[:, None]
    return torch.where(real, starts[:, None] + step, starts[:, None]), real


class Gather(torch.autograd.Function):
    """Rows of x (T, ...) by `index`; each row of x has exactly one real place, at `home` of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, home: Tensor) -> Tensor:
        ctx.save_for_backward(home)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (home,) = ctx.saved_tensors
        return grads[0].index_select(0, home), None, None


class Scatter(torch.autograd.Function):
    """The inverse of `Gather`: real places of x (b * n, ...) back in the order of the stream; padding is left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, home: Tensor, padding: Tensor) -> Tensor:
        ctx.save_for_backward(index, padding)
        return x.index_select(0, home)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, padding = ctx.saved_tensors
        back = grads[0].index_select(0, index)
        if padding.numel():
            back.index_fill_(0, padding, 0)
        return back, None, None, None
