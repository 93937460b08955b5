"""Couplings: networks that can be undone exactly, because each half of a vector is changed by the other half alone.

NICE    y1 = x1 + F(x2)             y2 = x2 + G(y1)
GLOW    y1 = e(s2) x1 + t2          y2 = e(s1) x2 + t1        (s2, t2) = S2(x2), (s1, t1) = S1(y1)

e(s) = exp(0.636 c atan(s / c)) with c = 5, so that no feature grows or shrinks by more than e^c.

Papers: Dinh et al. 2015, "NICE: Non-linear Independent Components Estimation" (arXiv:1410.8516); Kingma & Dhariwal
2018, "Glow: Generative Flow with Invertible 1x1 Convolutions" (arXiv:1807.03039).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["glow", "nice"]

CLAMP = 5.0
Network = Callable[[Tensor], Tensor]


def nice(x: Tensor, first: Network, second: Network, undo: bool) -> Tensor:
    """y (n, width) of x, or with `undo` x of y; `first` is F, `second` is G."""
    one, two = _halves(x)
    if undo:
        two = two - second(one)
        one = one - first(two)
    else:
        one = one + first(two)
        two = two + second(one)
    return torch.cat((one, two), -1)


def glow(x: Tensor, first: Network, second: Network, undo: bool) -> Tensor:
    """y (n, width) of x, or with `undo` x of y; `first` is S1, `second` is S2."""
    one, two = _halves(x)
    if undo:
        scale, shift = first(one).split(two.shape[-1], -1)
        two = (two - shift) * _grown(-scale)
        scale, shift = second(two).split(one.shape[-1], -1)
        one = (one - shift) * _grown(-scale)
    else:
        scale, shift = second(two).split(one.shape[-1], -1)
        one = one * _grown(scale) + shift
        scale, shift = first(one).split(two.shape[-1], -1)
        two = two * _grown(scale) + shift
    return torch.cat((one, two), -1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]


def _grown(s: Tensor) -> Tensor:
    """e(s); e(-s) is its inverse."""
    return torch.exp(0.636 * CLAMP * torch.atan(s / CLAMP))
