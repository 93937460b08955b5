"""The trainable tensors of one adapter as one tensor, for the passes that go over all of them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Flat", "Key", "whole_parameters"]

Key = tuple[str, str]
"""A site's path, and the name of one of its parameters."""


class Flat:
    """A `parameter` (n,) that holds the values of others laid end to end; they become views of it.

    What it learns they learn. Hundreds of small tensors would cost clipping, an optimizer, casts to the base's dtype
    and the collecting of gradients as many calls each.
    """

    @torch.no_grad()
    def __init__(self, parameters: Mapping[Key, nn.Parameter]) -> None:
        self.shapes: dict[Key, torch.Size] = {name: p.shape for name, p in parameters.items()}
        self.parameter = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters.values()]))
        for own, part in zip(parameters.values(), self.views(self.parameter.data), strict=True):
            own.data = part

    def views(self, values: Tensor) -> list[Tensor]:
        """The parts of `values` (n,), each in its own shape."""
        shapes = self.shapes.values()
        return [part.view(s) for part, s in zip(values.split([s.numel() for s in shapes]), shapes, strict=True)]


def whole_parameters(flats: Sequence[Sequence[Flat]], dtype: torch.dtype | None) -> list[dict[str, dict[str, Tensor]]]:
    """The parameters of K adapters by site and name, in `dtype`.

    `flats` holds each adapter's, alike in all. Gradients reach the parameters of the flats, in one piece. The values of
    one name are views of one contiguous tensor (K, ...), which batched products would make of them else.
    """
    found: list[dict[str, dict[str, Tensor]]] = [{} for _ in flats]
    for alike in zip(*flats, strict=True):
        own = [flat.parameter for flat in alike]
        kind = own[0].dtype if dtype is None else dtype
        values = iter(_Spread.apply(kind, alike, *own))  # pyright: ignore
        for path, name in alike[0].shapes:
            for adapter in found:
                adapter.setdefault(path, {})[name] = next(values)
    return found


class _Spread(torch.autograd.Function):
    """The parts of K flat vectors in another dtype: all those of one name, then all of the next.

    One pass over the values, and one over the gradients: autograd's own split and view would be three.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, flats: Sequence[Flat], *vectors: Tensor) -> tuple[Tensor, ...]:
        ctx.flats, ctx.likes = flats, [vector.detach() for vector in vectors]
        if len(flats) == 1:
            return tuple(flats[0].views(vectors[0].detach().to(dtype)))
        stacks = [vectors[0].new_empty(len(flats), *shape, dtype=dtype) for shape in flats[0].shapes.values()]
        rows = zip(*(stack.unbind(0) for stack in stacks), strict=True)
        for flat, vector, row in zip(flats, vectors, rows, strict=True):
            torch._foreach_copy_(row, flat.views(vector.detach()))  # pyright: ignore
        return tuple(part for stack in stacks for part in stack.unbind(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore
        made = []
        for number, (flat, like) in enumerate(zip(ctx.flats, ctx.likes, strict=True)):
            own = grads[number :: len(ctx.flats)]
            whole = torch.zeros_like(like) if any(g is None for g in own) else torch.empty_like(like)
            pairs = [(view, g) for view, g in zip(flat.views(whole), own, strict=True) if g is not None]
            torch._foreach_copy_([view for view, _ in pairs], [g for _, g in pairs])  # pyright: ignore
            made.append(whole)
        return None, None, *made
