"""What adapters do at every step of rows that go on, where nothing of it has to be found anew: such steps may be
captured, or laid out for other rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from inlay.kernels.bags import Bags
from inlay.kernels.picked import Picked

from .adapter import Adapter, Part
from .ready import SPOT, Ready
from .slots import Bagged
from .steps import Step

__all__ = ["Standing", "standing"]

OUTSIDE = ("attention", "tokens")
"""Kinds of sites that act through what stands before a row's tokens, once."""


@dataclass(frozen=True, eq=False)
class Standing:
    """What `count` rows do, by where a forward's values hold it: `steps`, and what is `ready` for calls of modules.
    `products` are those of tables, by the path of the layer; `alone` is whether adapters do nothing beside them."""

    count: int
    steps: Mapping[Any, Step]
    ready: Mapping[Any, Ready]
    products: Mapping[str, Bags | Picked]
    alone: bool

    def renewed(self, count: int, bags: Mapping[int, Bags | Picked | None]) -> dict[Any, Any] | None:
        """The values of a forward of `count` other rows that do nothing but products, with `bags` in the place of those
        here, by their id, or none; None where not every activation has a row for each."""
        made: dict[int, Step] = {}
        values: dict[Any, Any] = {}
        for (kind, path, shape, dtype), step in self.steps.items():
            renewed = [(act, bags[id(act.bags)]) for act in step.acts if isinstance(act, Bagged)]
            acts = [replace(act, bags=own) for act, own in renewed if own is not None]
            made[id(step)] = Step(step.site, acts, None)
            if shape[:2] != (1, self.count):
                return None
            values[kind, path, torch.Size((1, count, *shape[2:])), dtype] = made[id(step)]
        for spot, ready in self.ready.items():
            if ready.shape[:2] != (1, self.count):
                return None
            shape = torch.Size((1, count, *ready.shape[2:]))
            values[spot] = Ready(shape, ready.dtype, None, made[id(ready.step)])
        return values


def standing(values: Mapping[Any, Any], known: int, count: int, adapters: Iterable[Adapter]) -> Standing | None:
    """What the `adapters` of `count` rows do, by the `values` that the first step has left behind those that were
    `known`; None where it is not all there, or a part of it has to be found anew."""
    new = [(spot, value) for spot, value in islice(values.items(), known, None) if isinstance(spot, tuple)]
    steps: dict[Any, Step | None] = {spot: value for spot, value in new if spot[0] == "step"}
    paths = {path for _, path, *_ in steps}
    for adapter in adapters:
        if adapter.uses or not all(map(_stays, adapter.parts)):
            return None
        if not all(path in paths for part in adapter.parts for path in _paths(part)):
            return None
    every = {spot: step for spot, step in steps.items() if step is not None and step.rest is None}
    if len(every) < len(steps):
        return None
    acts = [(spot[1], act) for spot, step in every.items() for act in step.acts]
    products = {path: act.bags for path, act in acts if isinstance(act, Bagged)}
    changed = any(value is not None for spot, value in new if spot[0] == "input step")
    ready = {spot: value for spot, value in new if spot[0] == SPOT}
    return Standing(count, every, ready, products, len(products) == len(acts) and not changed)


def _stays(part: Part) -> bool:
    """Whether a part's method acts by nothing but what its sites' steps do: no gates, no inputs, no queries."""
    gates = part.method.has("prefix_gates") or part.method.has("input")
    return not gates and not part.attended and all(site.kind != "experts" for site in part.sites.values())


def _paths(part: Part) -> Iterator[str]:
    return (path for path, site in part.sites.items() if site.kind not in OUTSIDE)
