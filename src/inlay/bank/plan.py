"""What happens at one site: which adapters act on which spans of tokens. Made once for a route and a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from inlay.batch.route import Blend, Route
from inlay.errors import UsageError
from inlay.methods.contract import Params

from .adapter import Adapter, Part

__all__ = ["Act", "SitePlan", "plan_at"]

UNKNOWN: Any = object()


@dataclass(frozen=True, eq=False)
class Act:
    """One part of an adapter at a site, with the weight of what it adds; None where it is chained. `over` are the acts
    of the adapters that it uses, which are `frozen`."""

    adapter: Adapter
    part: Part
    weight: float | None
    over: Sequence[Sequence[Act]] = ()
    frozen: bool = False

    def params(self, path: str, dtype: torch.dtype | None, cache: dict[Any, Any]) -> Params:
        """What the method reads at a site; gradients reach it unless the adapter is frozen."""
        found = self.part.at(path, dtype, cache)
        return {name: value.detach() for name, value in found.items()} if self.frozen else found


@dataclass(frozen=True, eq=False)
class SitePlan:
    """For each share of the batch, in order, the acts of its adapters.

    `forms` are the shares of a linear layer that one form alone serves: those are computed together, whatever their
    methods. `rest` are shares of other sites, and those whose acts are chained, weighted, or have no form. `scaled` are
    shares whose input is scaled, or changed by a method's `input`.
    """

    forms: Sequence[tuple[int, Act]]
    rest: Sequence[tuple[int, Sequence[Act]]]
    scaled: Sequence[tuple[int, Sequence[Act]]]


def plan_at(path: str, route: Route, blends: Sequence[Blend], adapters: Mapping[str, Adapter]) -> SitePlan | None:
    """The plan of a site; None where no adapter of the route acts there."""
    spot = "plan", path, len(blends)
    if spot not in route.cache:
        known = "blends", len(blends)
        if known not in route.cache:
            route.cache[known] = [(blend, _alone(blend, adapters)) for blend in dict.fromkeys(blends)]
        route.cache[spot] = _made(path, route.cache[known], adapters)
    return route.cache[spot]


def _alone(blend: Blend, adapters: Mapping[str, Adapter]) -> Adapter | None:
    """The adapter of a blend that is one adapter, and not weighted."""
    return adapters[blend[0][0]] if len(blend) == 1 and blend[0][1] is None else None


def _check_order(path: str, acts: Sequence[Act]) -> None:
    """Raises: UsageError where what acts at a site would be lost, because one behind it computes the module anew."""
    lost = next((n for n, act in enumerate(acts) if n and act.part.method.replaces and act.weight is None), None)
    if lost is not None:
        names = " and ".join(dict.fromkeys(repr(act.adapter.name) for act in (acts[lost - 1], acts[lost])))
        raise UsageError(
            f"{names} cannot be chained at {path}, which the later one computes anew", "Route one of them."
        )
    changing = [act.adapter.name for act in acts if act.part.method.has("input")]
    if len(changing) > 1:
        names = " and ".join(map(repr, dict.fromkeys(changing)))
        raise UsageError(f"{names} cannot be used together: each changes what {path} reads", "Route one of them.")


def _acts(
    path: str, name: str, weight: float | None, adapters: Mapping[str, Adapter], frozen: bool = False
) -> list[Act]:
    """The acts of one adapter at a site."""
    found: list[Act] = []
    for part in adapters[name].parts:
        if path not in part.sites or part.sites[path].kind in ("attention", "tokens"):
            continue
        used = (_acts(path, other, None, adapters, frozen=True) for other in part.method.uses)
        found.append(Act(adapters[name], part, weight, [acts for acts in used if acts], frozen))
    return found


@dataclass(frozen=True, eq=False)
class _Share:
    """What one blend does at a site: all its acts where some change the input, and those that change the output; `form`
    is the one that a form serves."""

    changing: Sequence[Act]
    acts: Sequence[Act]
    form: Act | None


def _made(
    path: str, shares: Sequence[tuple[Blend, Adapter | None]], adapters: Mapping[str, Adapter]
) -> SitePlan | None:
    forms, rest, scaled = [], [], []
    for number, (blend, alone) in enumerate(shares):
        share = UNKNOWN if alone is None else alone.shares.get(path, UNKNOWN)  # it is, at nearly every step
        if share is UNKNOWN:
            share = _share(path, blend, alone, adapters)
        if share is None:
            continue
        if share.changing:
            scaled.append((number, share.changing))
        if share.form is not None:
            forms.append((number, share.form))
        elif share.acts:
            rest.append((number, share.acts))
    return SitePlan(forms, rest, scaled) if forms or rest or scaled else None


def _share(path: str, blend: Blend, alone: Adapter | None, adapters: Mapping[str, Adapter]) -> _Share | None:
    """The same at every call for an adapter `alone` that uses no others: it remembers that."""
    share = _share_of(path, blend, adapters)
    if alone is not None and not alone.uses:
        alone.shares[path] = share
    return share


def _share_of(path: str, blend: Blend, adapters: Mapping[str, Adapter]) -> _Share | None:
    acts = [act for name, weight in blend for act in _acts(path, name, weight, adapters)]
    if not acts:
        return None
    # What stands behind a sublayer stands behind the adapters of its last layer.
    acts.sort(key=lambda act: act.part.sites[path].kind in ("sublayer", "block"))
    _check_order(path, acts)
    changes = any(act.part.method.scales_input(act.part.sites[path]) or act.part.method.has("input") for act in acts)
    changing = tuple(acts) if changes else ()
    acts = [act for act in acts if not act.part.method.has("input")]
    alone = acts[0] if len(acts) == 1 and acts[0].weight is None else None
    served = alone is not None and alone.part.method.has_form() and alone.part.sites[path].kind == "linear"
    return _Share(changing, acts, alone if served else None)
