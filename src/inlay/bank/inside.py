"""How the rows of a padded batch lie in an activation of the backbone that does not hold them one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from inlay.batch.layout import Layout, Unit
from inlay.batch.padded import PaddedLayout
from inlay.batch.partition import Partition
from inlay.errors import UsageError
from inlay.methods.contract import Site
from inlay.sites.observe import Observation

from .behind import Positions

__all__ = ["Second", "laid_out"]


def laid_out(layout: Layout, site: Site, value: Tensor, observed: Observation) -> Any:
    """`layout`, or what does its work for `value` at a site, by how the site was seen to be called.

    Raises: UsageError where it cannot be told which row a part of `value` belongs to.
    """
    if not isinstance(layout, PaddedLayout) or site.kind == "head":
        return layout
    path, rows = site.path, len(layout.blends)
    if path in observed.second_rows and value.ndim > 2:
        return Second(layout, path)
    whole = len(value) == rows if value.ndim > 2 else _ordered(layout, site, len(value) if value.ndim else 0)
    if path in observed.scattered:
        whole = False
    if path in observed.other_input or (not whole and path in observed.whole_rows and len(value) % rows == 0):
        if len(value) % rows == 0:
            return _Other(layout, path)
    elif whole:
        return layout
    if len(set(layout.blends)) == 1:
        return _Shared(layout, path)
    name = ".".join(path.split(".")[-2 if site.name.isdigit() else -1 :])
    raise UsageError(
        f"{path} is given {tuple(value.shape)}, of which it cannot be told what belongs to which of {rows} rows",
        f"Give all rows one adapter, or leave {name} out of the targets.",
    )


def _ordered(layout: PaddedLayout, site: Site, vectors: int) -> bool:
    """Whether so many vectors can be all tokens of the rows, or one of each row, in their order: those that an expert
    is given are neither."""
    rows, columns = len(layout.blends), layout.columns
    pooled = vectors == rows and site.layer is None  # no block holds one vector of each row
    return vectors % rows == 0 and (not columns or pooled or vectors % (rows * columns) == 0)


class _Wrapped:
    """A padded layout, but for what its methods say."""

    def __init__(self, layout: PaddedLayout, path: str) -> None:
        self.layout, self.path = layout, path
        self.blends, self.partition = layout.blends, layout.partition

    def to_units(self, value: Tensor, width: int | None) -> Tensor:
        return value.reshape(-1, width) if width else value.reshape(-1)

    def from_units(self, value: Tensor, like: Tensor) -> Tensor:
        return value.reshape(like.shape)

    def in_order(self, value: Tensor) -> bool:
        return True

    def samples(self, members: Sequence[int], vectors: int) -> list[Unit]:
        return [(row, 0, vectors) for row in members]

    def positions(self) -> Positions | None:
        return None


class _Other(_Wrapped):
    """Rows of images or sounds, which have positions of their own, or pieces of rows."""


class Second(_Wrapped):
    """Rows in the second dimension, (tokens, rows, width)."""

    def turn(self, value: Tensor) -> Tensor:
        """(rows, tokens, width) of its own memory, or back."""
        return value.transpose(0, 1).contiguous()

    def to_units(self, value: Tensor, width: int | None) -> Tensor:
        return super().to_units(value.transpose(0, 1), width)

    def from_units(self, value: Tensor, like: Tensor) -> Tensor:
        return value.reshape(like.transpose(0, 1).shape).transpose(0, 1)

    def samples(self, members: Sequence[int], vectors: int) -> list[Unit]:
        return self.layout.samples(members, vectors)

    def positions(self) -> Positions | None:
        return self.layout.positions()


class _Shared(_Wrapped):
    """What all rows have in common, where all of them have one adapter."""

    def __init__(self, layout: PaddedLayout, path: str) -> None:
        super().__init__(layout, path)
        self.partition = Partition(layout.blends[:1])

    def samples(self, members: Sequence[int], vectors: int) -> list[Unit]:
        raise UsageError(
            f"{self.path} computes what all rows share, which belongs to no row that dropout could be drawn for",
            "Set dropout to 0, or leave the module out of the targets.",
        )

    def positions(self) -> Positions | None:
        raise UsageError(f"{self.path} holds no row's own tokens: no position can be told there", "Leave it out.")
