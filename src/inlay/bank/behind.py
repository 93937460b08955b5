"""Whose tokens an activation holds outside of the backbone: in the head behind it, or in what runs before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.batch.images import INPUTS, REMEDY, items_of
from inlay.batch.layout import Unit
from inlay.batch.partition import Partition
from inlay.batch.route import Route
from inlay.errors import UsageError
from inlay.methods.contract import Site

__all__ = ["Before", "Behind"]

Positions = tuple[Tensor, Tensor]


class Behind:
    """Does for a single activation what a layout does inside the backbone. `leads` are the vectors before each unit's
    first that its row has in other units."""

    attends = continued = False

    def __init__(
        self, route: Route, sizes: Sequence[int] | None = None, leads: Sequence[int] | None = None,
        positions: Positions | str | None = "",
    ) -> None:  # fmt: skip
        self.route, self.blends, self.sizes, self.leads = route, route.blends, sizes, leads
        self.partition = Partition(route.blends, sizes)
        self._positions = positions

    @classmethod
    def of(cls, route: Route, value: Tensor, width: int | None, alone: bool = False) -> Behind:
        """How `route` cuts `value` (..., width), or ids (width None), behind the backbone; in a module that is called
        `alone`, without its model, rows come first.

        Raises: UsageError where it cannot be told which row a part of it belongs to.
        """
        vectors = value.numel() // (width or 1)
        if route.uniform and route.noise is None:
            return cls(replace(route, blends=route.blends[:1], lengths=None))
        if route.lengths is None:
            rows = len(route.blends)
            if vectors % rows or (alone and len(value) != rows):
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
        leads, sizes = self.leads or [0] * len(self.blends), self.sizes or [1] * len(self.blends)
        # The mask of a row's own vectors goes on from one unit to the next.
        return [(m, -leads[m] * vectors, sizes[m] * vectors) for m in members]

    def positions(self) -> Positions | None:
        if not isinstance(self._positions, str):
            return self._positions
        if self._positions:
            raise UsageError(self._positions, "Leave the module out.")
        none = torch.zeros(self.partition.total, dtype=torch.long)
        return none, none


class Before:
    """What runs before the backbone of one call: ids that are embedded, and towers, whose units are images or sounds.

    `given` are the model's arguments by name.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Any], route: Route) -> None:
        self.model, self.route = model, route
        self.given = {name: value for name, value in given.items() if value is not None}
        self._made: dict[Any, tuple[Route, Sequence[int] | None, Sequence[int]] | UsageError] = {}

    def of(self, site: Site, value: Tensor, width: int | None) -> Behind:
        """How the route cuts `value` (..., width) at a site, or ids (width None).

        Raises: UsageError where it cannot be told which row a part of it belongs to.
        """
        ids = self.given.get("input_ids")
        if site.kind == "embedding" and isinstance(ids, Tensor) and value.shape[:2] == ids.shape:
            return Behind.of(self.route, value, width)
        vectors = value.numel() // (width or 1)
        try:
            route, sizes, leads = self._units(site)
            return _cut(site, route, sizes, leads, value, vectors)
        except UsageError:
            if not self.route.uniform or self.route.noise is not None:
                raise
        one = replace(self.route, blends=self.route.blends[:1], lengths=None)
        return Behind(one, positions=f"where an item begins in {site.path} cannot be told")

    def _units(self, site: Site) -> tuple[Route, Sequence[int] | None, Sequence[int]]:
        """A route with an entry for each item, their sizes, and how much the rows of each have before it."""
        name = self._input(site)
        if name not in self._made:
            try:
                self._made[name] = self._routed(name)
            except UsageError as error:
                self._made[name] = error
        made = self._made[name]
        if isinstance(made, UsageError):
            raise made
        return made

    def _routed(self, name: str) -> tuple[Route, Sequence[int] | None, Sequence[int]]:
        if self.route.lengths is not None:
            raise UsageError("a packed stream has no place for images or sounds", "Use padded rows and `route`.")
        items = items_of(getattr(self.model, "config", None), self.given, name)
        rows, blends, noise = len(self.given["input_ids"]), self.route.blends, self.route.noise
        if rows % len(blends):
            raise UsageError(
                f"the route has {len(blends)} rows but the batch has {rows}", "Give one entry for each row."
            )
        own = [row * len(blends) // rows for row in items.rows]
        leads, behind = [], [0] * rows
        for row, size in zip(items.rows, items.sizes or [1] * len(items.rows), strict=True):
            leads.append(behind[row])
            behind[row] += size
        if noise is not None:
            steps, samples = ([values[row] for row in own] for values in (noise.steps, noise.samples))
            noise = replace(noise, steps=steps, samples=samples, neftune=())
        return Route([blends[row] for row in own], noise=noise), items.sizes, leads

    def _input(self, site: Site) -> str:
        """The argument that a site's tower computes: the only one, or that which a module around it names."""
        there = [name for name in INPUTS if isinstance(self.given.get(name), Tensor)]
        if len(there) == 1:
            return there[0]
        path = site.path
        while path := path.rpartition(".")[0]:
            named = getattr(self.model.get_submodule(path), "main_input_name", None)
            if named in there and not (named == "pixel_values" and "pixel_values_videos" in there):
                return named
        raise UsageError(f"what {site.path} computes cannot be told of {', '.join(there) or 'this call'}", REMEDY)


def _cut(
    site: Site, route: Route, sizes: Sequence[int] | None, leads: Sequence[int], value: Tensor, vectors: int
) -> Behind:
    """`value` cut into the units of a route made for items. Raises: UsageError where it holds others."""
    count = len(route.blends)
    if sizes is None:
        if not count or vectors % count or (value.ndim > 2 and len(value) != count):
            shape = tuple(value.shape)
            what = f"{site.path} is given {shape} for {count} images or sounds of the rows"
            raise UsageError(f"{what}, and which part is whose cannot be told", REMEDY)
        return Behind(route, None, leads, None)
    total = sum(sizes)
    if any(size * vectors % total for size in sizes):
        raise UsageError(f"{vectors} vectors at {site.path} cannot be shared among the patches {list(sizes)}", REMEDY)
    own = [size * vectors // total for size in sizes]
    positions = torch.cat([torch.arange(n) for n in own]), torch.cat([torch.full((n,), n) for n in own])
    return Behind(route, own, [lead * vectors // total for lead in leads], positions)
