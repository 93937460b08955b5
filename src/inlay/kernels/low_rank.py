"""Low-rank products of many adapters over one stream of tokens, with their gradients, in one autograd function.

    y[span] += s (x[span] D^T) U^T        for each product, D (r, in), U (out, r), of any rank r

The gradient of the base's own product x W^T can ride along: then y was computed without a gradient, and x gets
grad W + s (grad U) D in one pass. No product reads a token that is not its own, so that a NaN stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batching import Block, batched
from .recomputed import save_for_backward, saved

__all__ = ["Product", "low_rank"]


@dataclass(frozen=True, eq=False)
class Product:
    """One adapter's product: its `spans` (start, stop) of tokens, s, D (r, in) and U (out, r) in the dtype of x.

    `middle` (r,) multiplies what D gives, `outer` (out,) what U gives; `mask` (tokens of the spans, in) multiplies D's
    input (dropout, already scaled up). Each may be None.
    """

    spans: tuple[tuple[int, int], ...]
    scale: float
    down: Tensor
    up: Tensor
    middle: Tensor | None = None
    outer: Tensor | None = None
    mask: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.middle is None and self.outer is None and self.mask is None

    def masks(self) -> Sequence[Tensor | None]:
        """The mask of each span."""
        if self.mask is None:
            return [None] * len(self.spans)
        return self.mask.split([stop - start for start, stop in self.spans])


def low_rank(
    x: Tensor, y: Tensor, products: Sequence[Product], base_weight: Tensor | None = None, in_place: bool = False
) -> Tensor:
    """y (..., out), T vectors of it, with the products of x (..., in) added; written into y, which must be contiguous
    then and no view, where `in_place` says that nobody else needs it.

    `base_weight` is W (out, in) where y = x W^T + bias was computed without a gradient.
    """
    tensors = [t for own in products for t in (own.down, own.up, own.middle, own.outer)]
    function = _LowRankInPlace if in_place else _LowRank
    return function.apply(x, y, base_weight, products, *tensors)  # pyright: ignore


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, base_weight: Tensor | None, products: Sequence[Product], *_: Tensor | None
    ) -> Tensor:
        made = y.contiguous().clone()
        _forward(ctx, x, made, base_weight, products)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        return _backward(ctx, grads[0])


class _LowRankInPlace(_LowRank):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, base_weight: Tensor | None, products: Sequence[Product], *_: Tensor | None
    ) -> Tensor:
        _forward(ctx, x, y, base_weight, products)
        ctx.mark_dirty(y)
        return y


Factors = tuple[Tensor, Tensor, Tensor | float]
"""D (K, r, in), U (K, out, r) and the scales of a block."""


def _forward(ctx: Any, x: Tensor, y: Tensor, base_weight: Tensor | None, products: Sequence[Product]) -> None:
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    shapes = tuple((own.spans, len(own.down) if own.plain else 0) for own in products)
    alone, blocks = batched(shapes, _pads(x), x.device)
    lows = [low for number in alone for low in _add_alone(products[number], flat_x, flat_y)]
    factors = [_factors(block, products) for block in blocks]
    for block, own in zip(blocks, factors, strict=True):
        low = (block.gather(flat_x) @ own[0].mT).mul_(own[2])
        lows.append(low)
        block.add(flat_y, low @ own[1].mT)
    ctx.products, ctx.alone, ctx.blocks, ctx.factors = products, alone, blocks, factors
    ctx.frozen = base_weight is not None
    save_for_backward(ctx, x, *lows, *([] if base_weight is None else [base_weight]))


def _pads(x: Tensor) -> bool:
    """Whether products of unlike ranks and sizes are better one padded product than several small ones."""
    return x.is_cuda or x.dtype in (torch.bfloat16, torch.float16)


def _add_alone(own: Product, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Add one product; gives s x D^T (n, r) of each span, which the backward needs."""
    for (start, stop), mask in zip(own.spans, own.masks(), strict=True):
        seen = x[start:stop] if mask is None else x[start:stop] * mask
        low = (seen @ own.down.t()).mul_(own.scale)
        scaled = low if own.middle is None else low * own.middle
        if own.outer is None:
            y[start:stop].addmm_(scaled, own.up.t())
        else:
            y[start:stop].addcmul_(scaled @ own.up.t(), own.outer)
        yield low


def _factors(block: Block, products: Sequence[Product]) -> Factors:
    """Those of a block's products, filled up with zeros to one rank."""
    own = [products[number] for number in block.members]
    scales = {product.scale for product in own}
    first = own[0]
    if all(len(product.down) == block.rank for product in own):
        downs, ups = torch.stack([p.down.detach() for p in own]), torch.stack([p.up.detach() for p in own])
    else:
        downs = first.down.new_zeros(len(own), block.rank, first.down.shape[1])
        ups = first.up.new_zeros(len(own), first.up.shape[0], block.rank)
        for down, up, product in zip(downs, ups, own, strict=True):
            down[: len(product.down)] = product.down.detach()
            up[:, : len(product.down)] = product.up.detach()
    if len(scales) == 1:
        return downs, ups, first.scale
    return downs, ups, torch.tensor([p.scale for p in own], dtype=ups.dtype, device=ups.device)[:, None, None]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    whole_x, *rest = saved(ctx)
    base_weight = rest.pop() if ctx.frozen else None
    x, lows = whole_x.reshape(-1, whole_x.shape[-1]), iter(rest)
    whole = grad.contiguous()
    grad = whole.view(-1, whole.shape[-1])
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.zeros_like(x) if base_weight is None else grad @ base_weight
    found: list[Tensor | None] = [None] * (4 * len(ctx.products))
    for number in ctx.alone:
        needs = ctx.needs_input_grad[4 + 4 * number : 8 + 4 * number]
        found[4 * number : 4 * number + 4] = _alone_backward(ctx.products[number], needs, x, grad, grad_x, lows)
    for block, factors in zip(ctx.blocks, ctx.factors, strict=True):
        downs, ups = _block_backward(block, factors, x, grad, grad_x, next(lows))
        for number, down, up in zip(block.members, downs, ups, strict=True):
            rank = len(ctx.products[number].down)
            found[4 * number : 4 * number + 2] = down[:rank], up[:, :rank]
    grad_y = whole if ctx.needs_input_grad[1] else None
    return None if grad_x is None else grad_x.view(whole_x.shape), grad_y, None, None, *found


def _block_backward(
    block: Block, factors: Factors, x: Tensor, grad: Tensor, grad_x: Tensor | None, low: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of all D (K, r, in) and U (K, out, r) of a block; that of x is added to `grad_x`."""
    downs, ups, scale = factors
    own = block.gather_gradient(grad)
    grad_low = (own @ ups).mul_(scale)
    if grad_x is not None:
        block.add(grad_x, grad_low @ downs)
    return grad_low.mT @ block.gather(x), (low.mT @ own).mT


def _alone_backward(
    product: Product, needs: Sequence[bool], x: Tensor, grad: Tensor, grad_x: Tensor | None, lows: Iterator[Tensor]
) -> list[Tensor | None]:
    """The gradients of D, U, middle and outer, of those that `needs` names; that of x is added to `grad_x`."""
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
        if needs[0]:
            _collect(made, 0, grad_low.t() @ (x_own if mask is None else x_own * mask))
        if grad_x is not None and mask is None:
            grad_x[start:stop].addmm_(grad_low, product.down)
        elif grad_x is not None and mask is not None:
            grad_x[start:stop].addcmul_(grad_low @ product.down, mask)
    return made


def _collect(made: list[Tensor | None], at: int, value: Tensor) -> None:
    before = made[at]
    made[at] = value if before is None else before + value
