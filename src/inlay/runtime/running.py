"""A row in flight: what it was given, has read and has written."""

from __future__ import annotations

from dataclasses import dataclass, field

from inlay.batch.past import Past
from inlay.batch.route import Blend, RowSpec

from .sharing import Name, Root

__all__ = ["Running"]


@dataclass(eq=False)
class Running:
    """A row in flight: the tokens `ids` that it was given and has written.

    It reads its prompt `whole`, in one forward, where its adapters need that. `ahead` keys of its adapters stand before
    its tokens, and move their positions by `shift`. `root` is what the names of its blocks begin with, `names` are
    those of the blocks that are full, and `cached` tokens of its prompt were read by others before.
    """

    route: RowSpec
    blend: Blend
    ids: list[int]
    past: Past
    whole: bool
    ahead: int
    shift: int
    root: Root
    age: int
    names: list[Name] = field(default_factory=list)
    cached: int = 0
    lands: bool = True

    @property
    def unread(self) -> int:
        return len(self.ids) - self.past.own

    @property
    def written(self) -> list[int]:
        """The tokens behind its prompt."""
        return self.ids[self.past.prompt :]
