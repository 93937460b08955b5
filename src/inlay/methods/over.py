"""Methods that act over other adapters of the same bank: what those give is what they are computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor

from inlay.sites.site import Site

from .token_view import Tokens

__all__ = ["Over"]


class Over:
    """The part of `Method` that knows of other adapters, by their names alone. Those are never trained on the way."""

    @property
    def uses(self) -> tuple[str, ...]:
        """The names of the adapters that it is over; a bank keeps them as long as it is there."""
        return ()

    def over(self, sites: Mapping[str, Sequence[Site]]) -> Self:
        """The method with what the sites of the adapters that it `uses` say, by their names, filled in.

        Raises: UsageError where it cannot act over one of them, and says why.
        """
        return self

    def fuse(
        self, params: Mapping[str, Tensor], x: Tensor, y: Tensor, made: Sequence[Tensor], site: Site, tokens: Tokens
    ) -> Tensor:
        """The output that leaves the site instead of y, in the place of a method's `output`: `made` holds what each of
        the adapters that act there would give instead, (n, out), in the order of `uses`."""
        raise NotImplementedError
