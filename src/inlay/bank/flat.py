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
        for own, part in zip(parameters.values(), self.parameter.data.split(self.sizes), strict=True):
            own.data = part.view(own.shape)

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes.values()]


def whole_parameters(flats: Sequence[Sequence[Flat]], dtype: torch.dtype | None) -> list[dict[str, dict[str, Tensor]]]:
    """The parameters of K adapters by site and name, in `dtype`.

    `flats` holds each adapter's, alike in all. Gradients reach the parameters of the flats, in one piece. The values of
    one name are views of one contiguous tensor (K, ...).
    """
    found: list[dict[str, dict[str, Tensor]]] = [{} for _ in flats]
    for alike in zip(*flats, strict=True):
        own = [flat.parameter for flat in alike]
        kind = own[0].dtype if dtype is None else dtype
        whole: Tensor = own[0].to(kind) if len(own) == 1 else _Rows.apply(kind, *own)  # pyright: ignore
        shapes = alike[0].shapes
        for (path, name), part in zip(shapes, whole.split(alike[0].sizes, -1), strict=True):
            shape = shapes[path, name]
            # Batched products would copy rows that are far apart, in the forward and again in the backward.
            values = [part.view(shape)] if len(own) == 1 else part.contiguous().view(len(own), *shape).unbind(0)
            for adapter, value in zip(found, values, strict=True):
                adapter.setdefault(path, {})[name] = value
    return found


class _Rows(torch.autograd.Function):
    """Vectors (n,) as the rows of one tensor (K, n) of another dtype, in one pass."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *vectors: Tensor) -> Tensor:
        rows = vectors[0].new_empty(len(vectors), len(vectors[0]), dtype=dtype)
        for row, vector in zip(rows, vectors, strict=True):
            row.copy_(vector)
        ctx.dtype = vectors[0].dtype
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return None, *(row.to(ctx.dtype) for row in grads[0])
