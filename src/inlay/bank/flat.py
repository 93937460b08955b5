"""The trainable tensors of one adapter as one tensor, for the passes that go over all of them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Flat", "parts_of"]

Name = tuple[str, str]
"""A site's path, and the name of one of its parameters."""


class Flat:
    """A `parameter` (n,) that holds the values of others laid end to end; they become views of it.

    What it learns they learn. Hundreds of small tensors would cost clipping, an optimizer, casts to the base's dtype
    and the collecting of gradients as many calls each.
    """

    @torch.no_grad()
    def __init__(self, parameters: Mapping[Name, nn.Parameter]) -> None:
        self.shapes: dict[Name, torch.Size] = {name: p.shape for name, p in parameters.items()}
        self.parameter = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters.values()]))
        for own, part in zip(parameters.values(), self.parameter.data.split(self.sizes), strict=True):
            own.data = part.view(own.shape)

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes.values()]


def parts_of(flats: Sequence[Sequence[Flat]], dtype: torch.dtype | None) -> dict[str, dict[str, Tensor]]:
    """The parameters of adapters by site and name, in `dtype`: one adapter's as they are, those of K as (K, ...).

    `flats` holds each adapter's, alike in all. Gradients reach the parameters of the flats, in one piece.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for alike in zip(*flats, strict=True):
        wholes = [flat.parameter if dtype is None else flat.parameter.to(dtype) for flat in alike]
        whole = wholes[0] if len(wholes) == 1 else torch.stack(wholes)
        shapes = alike[0].shapes
        for (path, key), part in zip(shapes, whole.split(alike[0].sizes, -1), strict=True):
            found.setdefault(path, {})[key] = part.view(*whole.shape[:-1], *shapes[path, key])
    return found
