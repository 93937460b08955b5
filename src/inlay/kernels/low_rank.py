"""Low-rank products of many adapters over one stream of tokens, with their gradients, in one autograd function.

    y[span] += s (x[span] D^T) U^T        for each product, D (r, in), U (out, r), of any rank r

The gradient of the base's own product x W^T can ride along: then y was computed without a gradient, and x gets
grad W + s (grad U) D in one pass. Products whose D is None take x D^T from a tensor that several layers share
(`shared_down`). No product reads a token that is not its own, so that a NaN stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batching import Block, batched, pads, stacked
from .recomputed import save_for_backward, saved

__all__ = ["Product", "low_rank"]


@dataclass(frozen=True, eq=False)
class Product:
    """One adapter's product: its `spans` (start, stop) of tokens, s, D (r, in) and U (out, r) in the dtype of x.

    D is None where x D^T was computed before, for several layers at once. `middle` (r,) multiplies
    what D gives, `outer` (out,) what U gives; `mask` (tokens of the spans, in) multiplies D's input (dropout, already
    scaled up). Each may be None.
    """

    spans: tuple[tuple[int, int], ...]
    scale: float
    down: Tensor | None
    up: Tensor
    middle: Tensor | None = None
    outer: Tensor | None = None
    mask: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def plain(self) -> bool:
        return self.middle is None and self.outer is None and self.mask is None

    def masks(self) -> Sequence[Tensor | None]:
        """The mask of each span."""
        if self.mask is None:
            return [None] * len(self.spans)
        return self.mask.split([stop - start for start, stop in self.spans])


def low_rank(
    x: Tensor, y: Tensor, products: Sequence[Product], base_weight: Tensor | None = None, in_place: bool = False,
    low: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y (..., out), T vectors of it, with the products of x (..., in) added; written into y, which must be contiguous
    then and no view, where `in_place` says that nobody else needs it.

    `base_weight` is W (out, in) where y = x W^T + bias was computed without a gradient. `low` (T, at least r) holds
    x D^T, from its first column on, of those products that have no D.
    """
    tensors = [t for own in products for t in (own.down, own.up, own.middle, own.outer)]
    function = _LowRankInPlace if in_place else _LowRank
    return function.apply(x, y, low, base_weight, products, *tensors)  # pyright: ignore


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, low: Tensor | None, base_weight: Tensor | None, products: Sequence[Product],
        *_: Tensor | None,
    ) -> Tensor:  # fmt: skip
        made = y.contiguous().clone()
        _forward(ctx, x, made, low, base_weight, products)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        return _backward(ctx, grads[0])


class _LowRankInPlace(_LowRank):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, low: Tensor | None, base_weight: Tensor | None, products: Sequence[Product],
        *_: Tensor | None,
    ) -> Tensor:  # fmt: skip
        _forward(ctx, x, y, low, base_weight, products)
        ctx.mark_dirty(y)
        return y


Factors = tuple[Tensor | None, Tensor, Tensor | float]
"""D (K, r, in), None where it was applied before; U (K, out, r); and the scales of a block."""


def _forward(
    ctx: Any, x: Tensor, y: Tensor, low: Tensor | None, base_weight: Tensor | None, products: Sequence[Product]
) -> None:
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    shapes = tuple((own.spans, own.rank if own.plain else 0) for own in products)
    alone, blocks = batched(shapes, pads(x, shapes), x.device)
    lows = [made for number in alone for made in _add_alone(products[number], flat_x, flat_y, low)]
    factors = [_factors(block, products) for block in blocks]
    for block, (down, up, scale) in zip(blocks, factors, strict=True):
        if down is None:
            assert low is not None
            made = block.gather(low[:, : block.rank]) * scale
        else:
            made = (block.gather(flat_x) @ down.mT).mul_(scale)
        lows.append(made)
        block.add(flat_y, made @ up.mT)
    ctx.products, ctx.alone, ctx.blocks, ctx.factors = products, alone, blocks, factors
    ctx.frozen, ctx.low = base_weight is not None, None if low is None else low.shape
    save_for_backward(ctx, x, *lows, *([] if base_weight is None else [base_weight]))


def _add_alone(own: Product, x: Tensor, y: Tensor, low: Tensor | None) -> Iterator[Tensor]:
    """Add one product; gives s x D^T (n, r) of each span, which the backward needs."""
    for (start, stop), mask in zip(own.spans, own.masks(), strict=True):
        if own.down is None:
            assert low is not None
            made = low[start:stop, : own.rank] * own.scale
        else:
            made = ((x[start:stop] if mask is None else x[start:stop] * mask) @ own.down.t()).mul_(own.scale)
        scaled = made if own.middle is None else made * own.middle
        if own.outer is None:
            y[start:stop].addmm_(scaled, own.up.t())
        else:
            y[start:stop].addcmul_(scaled @ own.up.t(), own.outer)
        yield made


def _factors(block: Block, products: Sequence[Product]) -> Factors:
    """Those of a block's products, filled up with zeros to one rank."""
    own = [products[number] for number in block.members]
    downs = [product.down.detach() for product in own if product.down is not None]
    up = stacked([product.up.detach() for product in own], block.rank, 1)
    down = stacked(downs, block.rank, 0) if downs else None
    if len({product.scale for product in own}) == 1:
        return down, up, own[0].scale
    return down, up, torch.tensor([p.scale for p in own], dtype=up.dtype, device=up.device)[:, None, None]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    whole_x, *rest = saved(ctx)
    base_weight = rest.pop() if ctx.frozen else None
    x, lows = whole_x.reshape(-1, whole_x.shape[-1]), iter(rest)
    whole = grad.contiguous()
    grad = whole.view(-1, whole.shape[-1])
    found = _Gradients(None, None, [None] * (4 * len(ctx.products)))
    if ctx.needs_input_grad[0]:
        found.x = torch.zeros_like(x) if base_weight is None else grad @ base_weight
    if ctx.low is not None:
        found.low = x.new_zeros(ctx.low)
    for number in ctx.alone:
        needs = ctx.needs_input_grad[5 + 4 * number : 9 + 4 * number]
        made = _alone_backward(ctx.products[number], needs, x, grad, found, lows)
        found.factors[4 * number : 4 * number + 4] = made
    for block, factors in zip(ctx.blocks, ctx.factors, strict=True):
        downs, ups = _block_backward(block, factors, x, grad, found, next(lows))
        for place, number in enumerate(block.members):
            rank = ctx.products[number].rank
            found.factors[4 * number] = None if downs is None else downs[place, :rank]
            found.factors[4 * number + 1] = ups[place, :, :rank]
    grad_y = whole if ctx.needs_input_grad[1] else None
    return None if found.x is None else found.x.view(whole_x.shape), grad_y, found.low, None, None, *found.factors


@dataclass
class _Gradients:
    """Of the flat x, of what D gave before, and of each product's four tensors in turn."""

    x: Tensor | None
    low: Tensor | None
    factors: list[Tensor | None]


def _block_backward(
    block: Block, factors: Factors, x: Tensor, grad: Tensor, found: _Gradients, low: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The gradients of all D (K, r, in) and U (K, out, r) of a block; what reaches x or `low` is added there."""
    down, up, scale = factors
    own = block.gather_gradient(grad)
    grad_low = (own @ up).mul_(scale)
    grad_up = (low.mT @ own).mT
    if down is None:
        assert found.low is not None
        block.add(found.low[:, : block.rank], grad_low)
        return None, grad_up
    if found.x is not None:
        block.add(found.x, grad_low @ down)
    return grad_low.mT @ block.gather(x), grad_up


def _alone_backward(
    product: Product, needs: Sequence[bool], x: Tensor, grad: Tensor, found: _Gradients, lows: Iterator[Tensor]
) -> list[Tensor | None]:
    """The gradients of D, U, middle and outer, of those that `needs` names; what reaches x or `low` is added there."""
    made: list[Tensor | None] = [None] * 4
    for (start, stop), mask in zip(product.spans, product.masks(), strict=True):
        own, low, x_own = grad[start:stop], next(lows), x[start:stop]
        scaled = low if product.middle is None else low * product.middle
        if needs[3]:
            _collect(made, 3, (own * (scaled @ product.up.t())).sum(0))
        if product.outer is not None:
            own = own * product.outer
        if needs[1]:  # this way round it is up to twice as fast
            _collect(made, 1, (scaled.t() @ own).t())
        grad_low = own @ product.up
        if product.middle is not None:
            if needs[2]:
                _collect(made, 2, (grad_low * low).sum(0))
            grad_low.mul_(product.middle)
        grad_low.mul_(product.scale)
        if product.down is None:
            assert found.low is not None
            found.low[start:stop, : product.rank] = grad_low
            continue
        if needs[0]:
            _collect(made, 0, grad_low.t() @ (x_own if mask is None else x_own * mask))
        if found.x is not None and mask is None:
            found.x[start:stop].addmm_(grad_low, product.down)
        elif found.x is not None and mask is not None:
            found.x[start:stop].addcmul_(grad_low @ product.down, mask)
    return made


def _collect(made: list[Tensor | None], at: int, value: Tensor) -> None:
    before = made[at]
    made[at] = value if before is None else before + value
