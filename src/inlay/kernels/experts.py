"""Products with the matrices of a mixture's experts, and low-rank ones of many adapters, in one autograd function.

    y[i] = W_e x[i] + b_e + sum over the adapters of row i:  s U_e (D_e x[i])        e is the expert of row i

Rows stand in the order of their experts, and within an expert those of an adapter side by side. No product reads a row
that is not its own, so that a NaN stays where it is. Where an adapter has few rows at each of many experts, its
products are one batched product, padded by rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gather import padded_index

__all__ = ["ExpertProduct", "ExpertSpan", "expert_linear"]

ExpertSpan = tuple[int, int, int]
"""An expert, and the rows (start, stop) that go through it."""


@dataclass(frozen=True, eq=False)
class ExpertProduct:
    """One adapter's products: its `spans` of rows, s, D (E, r, in) and U (E, out, r) in the dtype of x."""

    spans: Sequence[ExpertSpan]
    scale: float
    down: Tensor
    up: Tensor


def expert_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, spans: Sequence[ExpertSpan],
    products: Sequence[ExpertProduct],
) -> Tensor:  # fmt: skip
    """y (S, out) for x (S, in); W is `weight` (E, out, in), or (E, in, out) where it is stored `transposed`, `bias`
    (E, out). Rows of no span get zeros."""
    tensors = [t for own in products for t in (own.down, own.up)]
    return _ExpertLinear.apply(x, weight, bias, transposed, spans, products, *tensors)  # pyright: ignore


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, spans: Sequence[ExpertSpan],
        products: Sequence[ExpertProduct], *_: Tensor,
    ) -> Tensor:  # fmt: skip
        y = x.new_zeros(len(x), weight.shape[2 if transposed else 1])
        for expert, start, stop in spans:
            torch.mm(x[start:stop], _matrix(weight, expert, transposed, x.dtype), out=y[start:stop])
            if bias is not None:
                y[start:stop] += bias[expert]
        lows = [_add(own, x, y) for own in products]
        ctx.transposed, ctx.spans, ctx.products = transposed, spans, products
        ctx.save_for_backward(x, weight, *lows)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        x, weight, *lows = ctx.saved_tensors
        grad, needs = grads[0].contiguous(), ctx.needs_input_grad
        grad_x = torch.zeros_like(x) if needs[0] else None
        grad_weight = torch.zeros_like(weight) if needs[1] else None
        grad_bias = grad.new_zeros(len(weight), grad.shape[1]) if needs[2] else None
        for expert, start, stop in ctx.spans:
            own = grad[start:stop]
            if grad_x is not None:
                torch.mm(own, _matrix(weight, expert, ctx.transposed, x.dtype).t(), out=grad_x[start:stop])
            if grad_weight is not None:
                full = x[start:stop].t() @ own
                grad_weight[expert] = full if ctx.transposed else full.t()
            if grad_bias is not None:
                grad_bias[expert] = own.sum(0)
        found = [g for own, low in zip(ctx.products, lows, strict=True) for g in _gradients(own, x, grad, grad_x, low)]
        return grad_x, grad_weight, grad_bias, None, None, None, *found


def _matrix(weight: Tensor, expert: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """W_e^T (in, out)"""
    own = weight[expert].to(dtype)
    return own if transposed else own.t()


MOST, WASTE = 32, 3.0
"""Rows of an expert up to which products are batched on the average, and by how much padding may swell them."""


@dataclass(frozen=True, eq=False)
class _Padded:
    """The rows of one adapter's spans as (K, n): `index` says which row stands where, `own` where the real ones are
    (flat), and `padding` which places are none; a padded place repeats the first row of its span."""

    experts: Tensor
    index: Tensor
    own: Tensor
    padding: Tensor

    @classmethod
    def of(cls, spans: Sequence[ExpertSpan], like: Tensor) -> _Padded | None:
        """None where the spans are better computed one by one, as always in half precision on a CPU."""
        if not like.is_cuda and like.dtype in (torch.bfloat16, torch.float16):
            return None
        sizes, device = [stop - start for _, start, stop in spans], like.device
        if len(spans) < 3 or sum(sizes) > MOST * len(spans) or max(sizes) * len(spans) > WASTE * sum(sizes):
            return None
        table = torch.tensor([(expert, start, stop - start) for expert, start, stop in spans])
        index, real = padded_index(table[:, 1], table[:, 2])
        flat = real.flatten()
        places = (flat.nonzero()[:, 0], (~flat).nonzero()[:, 0])
        return cls(table[:, 0].to(device), index.to(device), *(place.to(device) for place in places))

    def gather(self, x: Tensor) -> Tensor:
        """x (S, width) as (K, n, width)"""
        return x.index_select(0, self.index.flatten()).view(*self.index.shape, x.shape[1])

    def add(self, y: Tensor, made: Tensor) -> None:
        """Add `made` (K, n, width) to its rows of y (S, width)."""
        rows = self.index.flatten().index_select(0, self.own)
        y.index_add_(0, rows, made.flatten(0, 1).index_select(0, self.own))


def _add(own: ExpertProduct, x: Tensor, y: Tensor) -> Tensor:
    """Add one adapter's products to y; returns s D_e x of its rows, which the backward needs: (n, r), or (K, n, r)."""
    padded = _Padded.of(own.spans, x)
    if padded is not None:
        low = (padded.gather(x) @ own.down[padded.experts].mT).mul_(own.scale)
        padded.add(y, low @ own.up[padded.experts].mT)
        return low
    lows = []
    for expert, start, stop in own.spans:
        low = (x[start:stop] @ own.down[expert].t()).mul_(own.scale)
        y[start:stop].addmm_(low, own.up[expert].t())
        lows.append(low)
    return torch.cat(lows)


def _gradients(own: ExpertProduct, x: Tensor, grad: Tensor, grad_x: Tensor | None, low: Tensor) -> list[Tensor]:
    """The gradients of D and U, zeros for experts that no row went through; that of x is added to `grad_x`."""
    down, up = torch.zeros_like(own.down), torch.zeros_like(own.up)
    padded = _Padded.of(own.spans, x)
    if padded is not None:
        rows = padded.gather(grad)
        rows.flatten(0, 1).index_fill_(0, padded.padding, 0)  # padding must count nowhere
        up[padded.experts] = rows.mT @ low
        grad_low = (rows @ own.up[padded.experts]).mul_(own.scale)
        down[padded.experts] = grad_low.mT @ padded.gather(x)
        if grad_x is not None:
            padded.add(grad_x, grad_low @ own.down[padded.experts])
        return [down, up]
    parts = low.split([stop - start for _, start, stop in own.spans])
    for (expert, start, stop), part in zip(own.spans, parts, strict=True):
        rows = grad[start:stop]
        torch.mm(rows.t(), part, out=up[expert])
        grad_low = (rows @ own.up[expert]).mul_(own.scale)
        torch.mm(grad_low.t(), x[start:stop], out=down[expert])
        if grad_x is not None:
            grad_x[start:stop].addmm_(grad_low, own.down[expert])
    return [down, up]
