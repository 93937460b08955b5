"""Tensors that a backward makes once more instead of keeping them: what they are made from is kept anyhow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

__all__ = ["Again", "keep", "kept"]


class Again(ABC):
    """Makes a tensor again for the backward of everything that it went into.

    The function that made it first calls `drop` in its own backward, which comes after all of those.
    """

    _held: Tensor | None = None

    @abstractmethod
    def make(self, *sources: Tensor) -> Tensor: ...

    def mark(self, made: Tensor, *sources: Tensor) -> Tensor:
        """Let `made` be known as what `make` gives of `sources`."""
        made.again = self, sources, made._version  # pyright: ignore[reportAttributeAccessIssue]
        return made

    def made(self, *sources: Tensor) -> Tensor:
        if self._held is None:
            self._held = self.make(*sources)
        return self._held

    def drop(self) -> None:
        self._held = None


def keep(ctx: Any, x: Tensor, *others: Tensor) -> None:
    """`ctx.save_for_backward`; in the place of an x that can be made again, what it is made from."""
    again, sources, version = getattr(x, "again", (None, (x,), x._version))
    if version != x._version:  # somebody wrote into it
        again, sources = None, (x,)
    ctx.again = again
    ctx.sources = len(sources)
    ctx.save_for_backward(*(source.detach() for source in sources), *others)


def kept(ctx: Any) -> tuple[Tensor, ...]:
    """What `keep` was given."""
    saved = ctx.saved_tensors
    sources, others = saved[: ctx.sources], saved[ctx.sources :]
    return (sources[0] if ctx.again is None else ctx.again.made(*sources), *others)
