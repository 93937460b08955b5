"""Mixtures of experts: what stands in for a module that holds them, where adapters of the route act on its matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.kernels.experts import ExpertProduct, ExpertSpan, expert_linear
from inlay.kernels.standin import StandIn
from inlay.methods.contract import Site
from inlay.sites.experts import ExpertWeight, Mixture, Pairs

from .acting import Scope
from .plan import Act, SitePlan

__all__ = ["stand_in_for"]

ScopeOf = Callable[[Site, Tensor], tuple[SitePlan, Scope] | None]
"""What acts on an activation at a site; see `inlay.bank.applying.SiteHooks`."""


def stand_in_for(mixture: Mixture, sites: Mapping[str, Site], scope_of: ScopeOf) -> StandIn:
    """Stands in for the module's forward wherever an adapter acts on one of its `sites`, by the parameters' names."""

    def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = mixture.tokens(args, kwargs)
        found = {name: own for name, site in sites.items() if (own := scope_of(site, tokens)) is not None}
        return _computed(mixture, mixture.pairs(args, kwargs), found) if found else original(*args, **kwargs)

    return StandIn(mixture.module, run)


def _computed(mixture: Mixture, pairs: Pairs, found: Mapping[str, tuple[SitePlan, Scope]]) -> Tensor:
    """The module's output with all that acts on its matrices: the base's products once for all tokens."""
    scope = next(iter(found.values()))[1]
    shares = len(scope.layout.partition.shares)
    key = pairs.expert * shares + _owners(scope, pairs.tokens, pairs.x.device)[pairs.token]
    order = key.argsort(stable=True)
    counts = torch.bincount(key, minlength=mixture.experts * shares)[: mixture.experts * shares]
    spans = _spans(counts.view(mixture.experts, shares).tolist())
    whole = _joined(spans)
    device = pairs.x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else pairs.x.dtype

    def product(weight: ExpertWeight, x: Tensor) -> Tensor:
        x = x.to(dtype)
        plan = found.get(weight.name)
        products = [] if plan is None else _products(*plan, spans, pairs, order, x)
        bias = None if weight.bias is None else mixture.module.get_parameter(weight.bias)
        own = mixture.module.get_parameter(weight.name)
        with torch.autocast(device, enabled=False):
            return expert_linear(x, own, bias, weight.transposed, whole, products)

    return mixture.compute(pairs, order, product)


def _owners(scope: Scope, tokens: int, device: torch.device) -> Tensor:
    """For each token the number of its share, (tokens,) int64. Raises: UsageError where tokens are not whole rows."""
    total = scope.layout.partition.total
    if tokens % total:
        raise UsageError(f"{scope.site.path} is given {tokens} tokens of {total} rows", "Choose other targets.")
    owners = torch.zeros(tokens, dtype=torch.long)
    for number in range(len(scope.layout.partition.shares)):
        for start, stop in scope.spans(number, tokens):
            owners[start:stop] = number
    return owners.to(device)


def _spans(counts: Sequence[Sequence[int]]) -> dict[int, list[ExpertSpan]]:
    """The spans of each share, in the order of the experts, for the rows of each expert and share."""
    found: dict[int, list[ExpertSpan]] = {share: [] for share in range(len(counts[0]))}
    start = 0
    for expert, own in enumerate(counts):
        for share, count in enumerate(own):
            if count:
                found[share].append((expert, start, start + count))
            start += count
    return found


def _joined(spans: Mapping[int, Sequence[ExpertSpan]]) -> list[ExpertSpan]:
    """One span for each expert: those of its shares are neighbours."""
    experts: dict[int, list[int]] = {}
    for own in spans.values():
        for expert, start, stop in own:
            experts.setdefault(expert, []).extend((start, stop))
    return [(expert, min(ends), max(ends)) for expert, ends in sorted(experts.items())]


def _products(
    plan: SitePlan, scope: Scope, spans: Mapping[int, Sequence[ExpertSpan]], pairs: Pairs, order: Tensor, x: Tensor
) -> list[ExpertProduct]:
    """What acts at a site. Products add up in whatever order they are chained, and a weight scales one."""
    acts = [(number, act) for number, own in plan.rest for act in own]
    scope.lay_out([act.adapter for _, act in acts], x.dtype)
    return [made for number, act in acts if (made := _product(act, number, scope, spans[number], x)) is not None]


def _product(act: Act, number: int, scope: Scope, spans: Sequence[ExpertSpan], x: Tensor) -> ExpertProduct | None:
    form = act.part.form(scope.site.path, x.dtype, scope.cache)
    found = form.factors()
    if found is None or not spans:
        return None
    return ExpertProduct(spans, form.scale * (1.0 if act.weight is None else act.weight), *found)
