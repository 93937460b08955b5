"""Recomputation of a single tensor: the backward computes it again from its sources, which are saved anyhow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

__all__ = ["Recomputed", "save_for_backward", "saved"]


class Recomputed(ABC):
    """A tensor that several functions need in their backward and none of them saves.

    The first backward that asks computes it; the function that made it in the forward calls `release` in its own
    backward, which autograd runs after all of theirs.
    """

    _value: Tensor | None = None

    @abstractmethod
    def compute(self, *sources: Tensor) -> Tensor:
        """The tensor, from its sources."""

    def tag(self, made: Tensor, *sources: Tensor) -> Tensor:
        """Mark `made` as what `compute` gives for `sources`; returns it."""
        made.recomputed = self, sources, made._version  # pyright: ignore[reportAttributeAccessIssue]
        return made

    def get(self, *sources: Tensor) -> Tensor:
        if self._value is None:
            self._value = self.compute(*sources)
        return self._value

    def release(self) -> None:
        self._value = None


def save_for_backward(ctx: Any, x: Tensor, *others: Tensor) -> None:
    """`ctx.save_for_backward`, but with the sources of a tagged x in its place."""
    recomputed, sources, version = getattr(x, "recomputed", (None, (x,), x._version))
    if version != x._version:  # x has been written into since
        recomputed, sources = None, (x,)
    ctx.recomputed = recomputed
    ctx.sources = len(sources)
    ctx.save_for_backward(*(source.detach() for source in sources), *others)


def saved(ctx: Any) -> tuple[Tensor, ...]:
    """The tensors that `save_for_backward` was given."""
    found = ctx.saved_tensors
    sources, others = found[: ctx.sources], found[ctx.sources :]
    return (sources[0] if ctx.recomputed is None else ctx.recomputed.get(*sources), *others)
