"""By what the rows of a batch multiply their prefixes, where a method has gates for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.batch.forward import FORWARD, Forward
from inlay.methods.contract import Site
from inlay.sites.observe import Observation, first_tensor

from .acting import Scope, ShareTokens, taken
from .adapter import Adapter, Part
from .hooks import Hook
from .inside import laid_out
from .plan import Act

__all__ = ["gating_hook"]


def gating_hook(site: Site, adapters: Mapping[str, Adapter], owner: object, observed: Observation) -> Hook:
    """Before an attention module runs, leaves its rows' gates in the forward."""

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward, x = FORWARD.get(), first_tensor(args, kwargs)
        if forward is None or forward.owner is not owner or forward.behind or x is None:
            return
        if forward.layout.prefixes.longest and not forward.layout.prefixes.holds(module):
            found = _factors(site, adapters, forward, observed, x)
            if found is not None:
                forward.inputs["prefix gates", module] = found

    return Hook.before(site.module, run, named=True)


def _factors(
    site: Site, adapters: Mapping[str, Adapter], forward: Forward, observed: Observation, x: Tensor
) -> Tensor | None:
    """For keys and for values, each row or segment and each place of the longest prefix, a factor (2, units, P) of its
    own; None where no gate acts."""
    layout: Any = laid_out(forward.layout, site, x, observed)
    shares = layout.partition.shares
    parts = [_parts(site, share.blend, adapters) for share in shares]
    if not any(part.method.has("prefix_gates") for own in parts for _, part in own):
        return None
    flat, longest = layout.to_units(x, x.shape[-1]), forward.layout.prefixes.longest
    scope = Scope(site, forward.route, layout, forward, forward.drops)
    made = x.new_ones(2, len(forward.layout.blends), longest)
    for number, (share, own) in enumerate(zip(shares, parts, strict=True)):
        columns = [_gates(scope, Act(adapter, part, None), number, flat) for adapter, part in own]
        if columns:
            whole = torch.cat(columns, 2)
            members = torch.tensor(share.members, device=x.device)
            made = made.index_copy(1, members, F.pad(whole, (longest - whole.shape[2], 0), value=1.0))
    return made


def _parts(site: Site, blend: Any, adapters: Mapping[str, Adapter]) -> list[tuple[Adapter, Part]]:
    """What puts a prefix before the keys of a module, in the order in which it does."""
    found = [(adapters[name], part) for name, _ in blend for part in adapters[name].parts]
    return [(a, part) for a, part in found if part.method.prefix_length and site.module in part.order]


def _gates(scope: Scope, act: Act, number: int, flat: Tensor) -> Tensor:
    """The factors (2, rows, n) of one part of a share's adapters, whose prefix has n keys."""
    layout, method = scope.layout, act.part.method
    counts = [count for *_, count in layout.samples(layout.partition.shares[number].members, _each(scope, flat))]
    ones = flat.new_ones(len(counts), 2)
    if method.has("prefix_gates"):
        scope.lay_out([act.adapter], flat.dtype)
        params, own = act.part.at(scope.site.path, flat.dtype, scope.cache), act.part.sites[scope.site.path]
        x = taken(flat, scope.spans(number, len(flat)))
        gates = method.prefix_gates(params, x, own, ShareTokens(scope, act, number, len(flat)))
        first = torch.tensor([0, *counts[:-1]], device=flat.device).cumsum(0)  # gates are the same for all of a row
        ones = gates[first]
    return ones.t()[:, :, None].expand(2, len(counts), method.prefix_length)


def _each(scope: Scope, flat: Tensor) -> int:
    return len(flat) // scope.layout.partition.total
