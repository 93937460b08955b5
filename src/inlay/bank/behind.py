"""Whose tokens an activation holds outside of the backbone: in the head behind it, or in what runs before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inlay.batch.layout import Unit
from inlay.batch.partition import Partition
from inlay.batch.route import Route
from inlay.errors import UsageError

__all__ = ["Behind"]


class Behind:
    """Does for a single activation what a layout does inside the backbone."""

    def __init__(self, route: Route, sizes: Sequence[int] | None = None) -> None:
        self.sizes = sizes
        self.partition = Partition(route.blends, sizes)

    @classmethod
    def of(cls, route: Route, value: Tensor, width: int | None, before: bool) -> Behind:
        """How `route` cuts `value` (..., width), or ids (width None), `before` the backbone or behind it.

        Raises: UsageError where it cannot be told which row a part of it belongs to.
        """
        vectors = value.numel() // (width or 1)
        if route.uniform and route.noise is None:
            return cls(replace(route, blends=route.blends[:1], lengths=None))
        if before and not route.uniform:
            raise UsageError(
                "what runs before the backbone, such as an image tower, cannot be told apart by rows here",
                "Give all rows one adapter, or choose targets inside the backbone.",
            )
        if route.lengths is None:
            rows = len(route.blends)
            if vectors % rows:
                raise UsageError(f"the route has {rows} rows but {vectors} tokens came", "Give one entry for each row.")
            return cls(route)
        for sizes in (route.head_tokens, route.lengths):
            if sizes is not None and sum(sizes) == vectors:
                return cls(route, sizes)
        raise UsageError(f"{vectors} tokens behind the backbone belong to no segment", "Give `kept` with the segments.")

    def to_units(self, value: Tensor, width: int | None) -> Tensor:
        return value.reshape(-1, width) if width else value.reshape(-1)

    def from_units(self, value: Tensor, like: Tensor) -> Tensor:
        return value.reshape(like.shape)

    def samples(self, members: Sequence[int], vectors: int) -> list[Unit]:
        return [(m, 0, vectors if self.sizes is None else self.sizes[m] * vectors) for m in members]

    def positions(self) -> tuple[Tensor, Tensor]:
        none = torch.zeros(self.partition.total, dtype=torch.long)
        return none, none
