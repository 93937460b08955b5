"""Bottlenecks of many adapters over few tokens each, as when text is written.

a[v] = s (U act(D z[v] + d) + u)        each vector v with the D, d, U, u and s of its own adapter
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bags import RANK, Bags, units

__all__ = ["Bottleneck", "Bottlenecks"]

Activation = Callable[[Tensor], Tensor]
Bottleneck = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | float]
"""D (r, in), d (r,), U (out, r), u (out,) and the scale of one adapter: a number, (1,) or (out,)."""


@dataclass(frozen=True, eq=False)
class Bottlenecks:
    """`bias` is d for each pair of a vector and a unit (pairs, 8), `shift` s u of each vector (n, out)."""

    bags: Bags
    bias: Tensor
    shift: Tensor
    activation: Activation

    @classmethod
    def of(cls, own: Sequence[Bottleneck], counts: Sequence[int], activation: Activation) -> Bottlenecks:
        """Of as many vectors as `counts` says for each of the adapters, one adapter's behind the other's."""
        slots: list[tuple[int, ...]] = []
        biases: list[Tensor] = []
        for (down, down_bias, *_), count in zip(own, counts, strict=True):
            first = slots[-1][-1] + 1 if slots else 0
            slots += [tuple(range(first, first + units(len(down))))] * count
            whole = down_bias.new_zeros(units(len(down)) * RANK)
            whole[: len(down)] = down_bias
            biases.append(whole.view(-1, RANK).repeat(count, 1))
        shifts = [(bias * scale).expand(n, -1) for (*_, bias, scale), n in zip(own, counts, strict=True)]
        bags = Bags.of(slots, [[(down, _scaled(up, scale), 1.0) for down, _, up, _, scale in own]])
        return cls(bags, torch.cat(biases), torch.cat(shifts), activation)

    def __call__(self, z: Tensor) -> Tensor:
        """(n, out), of z (n, in)."""
        low = self.activation(self.bags.low(z).add_(self.bias))
        return self.bags.high(low, 0).add_(self.shift)


def _scaled(up: Tensor, scale: Tensor | float) -> Tensor:
    return up * (scale[:, None] if isinstance(scale, Tensor) else scale)
