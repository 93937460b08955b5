"""Some rows of a tensor that are read and written together, again and again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows"]


@dataclass(frozen=True, eq=False)
class Rows:
    """`count` rows of dimension 0 from `start` on, or those that `index` (count,) names; all rows where `whole`."""

    start: int
    count: int
    index: Tensor | None = None
    whole: bool = False

    @classmethod
    def of(cls, spans: Iterable[tuple[int, int]], total: int, device: torch.device) -> Rows:
        """The rows in `spans` (start, stop), one behind the other, of `total` rows."""
        joined: list[tuple[int, int]] = []
        for start, stop in spans:
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
        count = sum(stop - start for start, stop in joined)
        if len(joined) == 1:
            return cls(joined[0][0], count, None, count == total)
        return cls(0, count, torch.cat([torch.arange(start, stop, device=device) for start, stop in joined]))

    def take(self, tensor: Tensor) -> Tensor:
        """These rows of `tensor`: a view, but where they do not stand side by side."""
        if self.whole:
            return tensor
        if self.index is not None:
            return tensor.index_select(0, self.index)
        return tensor.narrow(0, self.start, self.count)

    def put(self, into: Tensor, value: Tensor) -> None:
        """Write `value` over these rows of `into`."""
        if self.index is not None:
            into.index_copy_(0, self.index, value.to(into.dtype))
        else:
            self.take(into).copy_(value)

    def add(self, into: Tensor, value: Tensor) -> None:
        """Add `value` to these rows of `into`."""
        if self.index is not None:
            into.index_add_(0, self.index, value.to(into.dtype))
        else:
            self.take(into).add_(value)
