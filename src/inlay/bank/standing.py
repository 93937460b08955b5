"""What adapters do at every step of rows that go on, where nothing of it has to be found anew: such steps may be
captured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inlay.kernels.picked import Picked

from .adapter import Adapter, Part
from .slots import Bagged
from .steps import Step

__all__ = ["Standing", "standing"]

OUTSIDE = ("attention", "tokens")
"""Kinds of sites that act through what stands before a row's tokens, once."""


@dataclass(frozen=True)
class Standing:
    """`products` are those of tables, by the path of the layer; `alone` is whether adapters do nothing beside them."""

    products: Mapping[str, Picked]
    alone: bool


def standing(values: Mapping[Any, Any], adapters: Iterable[Adapter]) -> Standing | None:
    """What the `adapters` of a flight do, by the `values` that its first step has left; None where it is not all there,
    or a part of it has to be found anew."""
    steps, changes = dict[str, list[Step | None]](), []
    for spot, found in values.items():
        if isinstance(spot, tuple) and spot[0] == "step":
            steps.setdefault(spot[1], []).append(found)
        elif isinstance(spot, tuple) and spot[0] == "input step":
            changes.append(found)
    for adapter in adapters:
        if adapter.uses or not all(map(_stays, adapter.parts)):
            return None
        if not all(path in steps for part in adapter.parts for path in _paths(part)):
            return None
    every = [step for own in steps.values() for step in own]
    if any(step is None or step.rest is not None for step in every):
        return None
    acts = [(path, act) for path, own in steps.items() for step in own if step is not None for act in step.acts]
    products = {path: act.bags for path, act in acts if isinstance(act, Bagged) and isinstance(act.bags, Picked)}
    return Standing(products, len(products) == len(acts) and not any(changes))


def _stays(part: Part) -> bool:
    """Whether a part's method acts by nothing but what its sites' steps do: no gates, no inputs, no queries."""
    gates = part.method.has("prefix_gates") or part.method.has("input")
    return not gates and not part.attended and all(site.kind != "experts" for site in part.sites.values())


def _paths(part: Part) -> Iterator[str]:
    return (path for path, site in part.sites.items() if site.kind not in OUTSIDE)
