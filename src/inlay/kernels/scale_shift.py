"""Scales and shifts of many adapters over one stream of tokens, in one autograd function.

y'[span] = a * y[span] + b        for each adapter; tokens of no span stay as they are
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Scaled", "scale_shift"]


@dataclass(frozen=True, eq=False)
class Scaled:
    """One adapter's `scale` and `shift` (width,), each may be None, over its `spans` (start, stop) of tokens."""

    spans: tuple[tuple[int, int], ...]
    scale: Tensor | None
    shift: Tensor | None


def scale_shift(y: Tensor, scaled: Sequence[Scaled]) -> Tensor:
    """A new tensor of y's shape (T, width)."""
    tensors = [t for own in scaled for t in (own.scale, own.shift)]
    return _ScaleShift.apply(y, scaled, *tensors)  # pyright: ignore


class _ScaleShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scaled: Sequence[Scaled], *tensors: Tensor | None) -> Tensor:
        made = y.clone()
        for own in scaled:
            for start, stop in own.spans:
                part = made[start:stop]
                if own.scale is not None:
                    part.mul_(own.scale)
                if own.shift is not None:
                    part.add_(own.shift)
        ctx.scaled = scaled
        ctx.save_for_backward(y)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        (y,), grad = ctx.saved_tensors, grads[0]
        grad_y = grad.clone() if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for own in ctx.scaled:
            scale = shift = None
            for start, stop in own.spans:
                part = grad[start:stop]
                if own.shift is not None:
                    shift = _sum(shift, part)
                if own.scale is not None:
                    scale = _sum(scale, part * y[start:stop])
                    if grad_y is not None:
                        grad_y[start:stop].mul_(own.scale)
            found += [scale, shift]
        return grad_y, None, *found


def _sum(before: Tensor | None, value: Tensor) -> Tensor:
    total = value.sum(0)
    return total if before is None else before + total
