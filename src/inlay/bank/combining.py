"""Several adapters made into one: those that are low-rank products, as a LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.kernels.combining import Signs, low_rank_factors, weighted
from inlay.methods.contract import Site, Structure
from inlay.methods.lora import LoRA

from .adapter import Adapter, Part
from .holding import Holding
from .rules import Combination

__all__ = ["Combines", "combined", "products"]


@dataclass(frozen=True, eq=False)
class _Product:
    """One adapter's product at a site, s U D, with D (r, in) and U (out, r)."""

    down: Tensor
    up: Tensor
    scale: float

    def whole(self) -> Tensor:
        return self.up @ self.down * self.scale


class Combines(Holding):
    """The part of a bank that makes one adapter of several."""

    base: Structure

    def combine(self, name: str, weights: Mapping[str, float], how: str = "cat", **settings: Any) -> Adapter:
        """Make a new adapter, a LoRA, of those that `weights` names; they stay as they are. `how` and the settings
        `rank`, `density`, `signs`, `clamp` and `seed` are those of `Combination`.

        Raises: UsageError where the rule does not fit, or naming an adapter that is more than low-rank products.
        """
        self._check_free(name)
        chosen = [(self._named(own), float(weight)) for own, weight in weights.items()]
        return self._keep(combined(name, chosen, Combination(how=how, **settings), self.base))


@torch.no_grad()
def combined(name: str, chosen: Sequence[tuple[Adapter, float]], by: Combination, base: Structure) -> Adapter:
    """A LoRA called `name`, of adapters with their weights."""
    if not chosen or not all(math.isfinite(weight) and weight for _, weight in chosen):
        raise UsageError("weights name no adapter, or have one that is no number but 0", "Give each a number.")
    forms = [(products(adapter), weight) for adapter, weight in chosen]
    ranks = [max(len(own.down) for own in found.values()) for found, _ in forms]
    generator = torch.Generator().manual_seed(by.seed)
    sites = {site.path: site for adapter, _ in chosen for site in adapter.sites.values()}
    order = [s for s in (*base.tables, *base.projections) if s.path in sites]
    rank = _rank(by, ranks, [adapter.name for adapter, _ in chosen])
    values: dict[str, dict[str, Tensor]] = {}
    for site in order:
        own = [(found[site.path], weight) for found, weight in forms if site.path in found]
        down, up = _factors(by, own, sites[site.path], rank, generator)
        values[site.path] = {"A": _widened(down, rank, 0), "B": _widened(up, rank, 1)}
    return Adapter.of(name, [(LoRA(r=rank, alpha=rank, targets=[s.path for s in order]), values)], base)


def products(adapter: Adapter) -> dict[str, _Product]:
    """By a site's path, what the adapter adds there. Raises: UsageError where it is more than low-rank products."""
    virtual = adapter.prefix_length or adapter.virtual_length
    remedy = "Leave it out." if virtual else "Mix them as they run: bank.route([{name: weight, ...}])."
    if len(adapter.parts) > 1:
        titles = " and ".join(method.title for method in adapter.methods)
        raise UsageError(f"{adapter.name!r} is {titles}: parts cannot be combined", remedy)
    part = adapter.parts[0]
    found = {path: _product(part, site) for path, site in part.sites.items()}
    if lacking := next((path for path, own in found.items() if own is None), None):
        what = f"{adapter.name!r} is {adapter.method.title}, which at {lacking} is more than a low-rank product"
        raise UsageError(f"{what}: it cannot be combined", remedy)
    return {path: own for path, own in found.items() if own is not None}


def _product(part: Part, site: Site) -> _Product | None:
    if site.kind not in ("linear", "embedding") or not part.method.has_form():
        return None
    form = part.form(site.path, None, {})
    factors = form.factors()
    if factors is None or any(t is not None for t in (form.in_scale, form.out_scale, form.shift)):
        return None
    return _Product(*factors, form.scale / (site.table_scale if site.is_embedding else 1.0))


def _rank(by: Combination, ranks: Sequence[int], names: Sequence[str]) -> int:
    if by.dense:
        return by.rank or max(ranks)
    if by.how == "cat":
        return sum(ranks)
    if len(set(ranks)) > 1:
        told = ", ".join(f"{name!r} {rank}" for name, rank in zip(names, ranks, strict=True))
        raise UsageError(f"{by.how} wants adapters of one rank: {told}", 'Choose "cat", or a rule with "svd".')
    return ranks[0]


def _factors(
    by: Combination, own: Sequence[tuple[_Product, float]], site: Site, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """D and U at one site, of the adapters that act there."""
    if by.how == "cat":
        return torch.cat([p.down * (weight * p.scale) for p, weight in own]), torch.cat([p.up for p, _ in own], 1)
    settings = by.density or 1.0, cast(Signs, by.signs), generator
    if by.dense:
        turned = site.transposed or site.is_embedding  # as the weight is stored: chance goes by places
        wholes = [p.whole().t().contiguous() if turned else p.whole() for p, _ in own]
        made = weighted(by.rule, wholes, [weight for _, weight in own], *settings)
        return low_rank_factors(made.t() if turned else made, rank, by.clamp)
    downs = [_widened(p.down, rank, 0) for p, _ in own]
    ups = [_widened(p.up, rank, 1) for p, _ in own]
    signed = [weight * p.scale for p, weight in own]
    roots = [math.sqrt(abs(value)) for value in signed]
    signs = [math.copysign(root, value) for root, value in zip(roots, signed, strict=True)]
    return weighted(by.rule, downs, signs, *settings), weighted(by.rule, ups, roots, *settings)


def _widened(factor: Tensor, rank: int, dim: int) -> Tensor:
    """`factor` with zeros up to `rank` along `dim`."""
    shape = [rank - factor.shape[dim] if d == dim else n for d, n in enumerate(factor.shape)]
    return torch.cat([factor, factor.new_zeros(shape)], dim).contiguous()
