"""The acts of one share after another: chained, weighted and formless methods, and sites that are no linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.batch.forward import Forward
from inlay.batch.noise import Dropper
from inlay.batch.partition import in_order
from inlay.batch.route import Route
from inlay.errors import UsageError
from inlay.methods.contract import LinearForm, Site

from .adapter import Adapter
from .plan import Act, SitePlan

__all__ = ["Scope", "act_in_turn", "input_scales", "scaled_input", "unseen"]

Spans = tuple[tuple[int, int], ...]


@dataclass(eq=False)
class Scope:
    """One activation at a site: the route that it runs under, how its tokens lie, and the forward it belongs to;
    `drops` is as in `Forward`."""

    site: Site
    route: Route
    layout: Any
    forward: Forward | None
    drops: bool = False

    @cached_property
    def cache(self) -> dict[Any, Any]:
        return {} if self.forward is None else self.forward.cache

    def spans(self, number: int, vectors: int) -> Spans:
        """The spans of the share `number` among so many vectors."""
        partition = self.layout.partition
        scale = vectors // partition.total
        return tuple((a * scale, b * scale) for a, b in partition.shares[number].spans)

    def lay_out(self, adapters: Sequence[Adapter], dtype: torch.dtype) -> None:
        """Cast the flat tensors of adapters that are trained, once a forward; those of equal shapes as one."""
        if not torch.is_grad_enabled():
            return
        alike: dict[Any, list[Adapter]] = {}
        for adapter in dict.fromkeys(adapters):
            if adapter.flats and ("whole", adapter.parts[0], dtype) not in self.cache:
                alike.setdefault(adapter.layout, []).append(adapter)
        for first, *others in alike.values():
            first.lay_out(dtype, self.cache, others)

    def dropper(self, act: Act, number: int, vectors: int) -> Callable[[Tensor, float], Tensor] | None:
        noise, partition = self.route.noise, self.layout.partition
        if noise is None:
            return F.dropout if self.drops else None
        each = vectors // partition.total
        units = [
            (noise.steps[member], noise.samples[member], lead, count)
            for member, lead, count in self.layout.samples(partition.shares[number].members, each)
        ]
        return Dropper(act.adapter.seed, act.part.key(self.site.path), units)

    def masked(self, act: Act) -> bool:
        """Whether D sees its input through a mask."""
        return bool(act.part.method.form_dropout()) and (self.drops or self.route.noise is not None)

    def mask(self, act: Act, number: int, spans: Spans, x: Tensor) -> Tensor | None:
        """What D's input is multiplied with, (tokens of the spans, in); None where nothing is dropped."""
        p = act.part.method.form_dropout()
        dropper = self.dropper(act, number, len(x)) if self.masked(act) else None
        return None if dropper is None else dropper(x.new_ones(sum(b - a for a, b in spans), x.shape[-1]), p)


class ShareTokens:
    """The tokens of one share, for one act; see `inlay.methods.contract.Tokens`."""

    def __init__(self, scope: Scope, act: Act, number: int, vectors: int) -> None:
        self._scope, self._act, self._number, self._vectors = scope, act, number, vectors

    @cached_property
    def _positions(self) -> tuple[Tensor, Tensor]:
        found = self._scope.layout.positions()
        if found is None:
            rows = self._scope.layout.partition.total
            whole = torch.arange(self._vectors // rows)
            found = whole.repeat(rows), torch.full((self._vectors,), len(whole))
        if self._vectors % len(found[0]):
            where = f"{self._scope.site.path} holds {self._vectors} vectors, the rows {len(found[0])} tokens"
            raise UsageError(f"{where}: no position can be told there", "Leave the module out.")
        spans = self._scope.spans(self._number, self._vectors)
        position, length = (taken(t.repeat_interleave(self._vectors // len(t)), spans) for t in found)
        return position, length

    @property
    def position(self) -> Tensor:
        return self._positions[0]

    @property
    def length(self) -> Tensor:
        return self._positions[1]

    def dropout(self, x: Tensor, p: float) -> Tensor:
        dropper = self._scope.dropper(self._act, self._number, self._vectors) if p else None
        return x if dropper is None else dropper(x, p)

    def normal(self, like: Tensor) -> Tensor | None:
        dropper = self._scope.dropper(self._act, self._number, self._vectors)
        if isinstance(dropper, Dropper):
            return dropper.normal(like)
        return None if dropper is None else torch.randn_like(like)


def taken(tensor: Tensor, spans: Spans) -> Tensor:
    """The spans of dimension 0, one behind the other."""
    pieces = [tensor[start:stop] for start, stop in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def act_in_turn(plan: SitePlan, scope: Scope, x: Tensor | None, y: Tensor) -> Tensor:
    """y (vectors, width) where each of the plan's `rest` has acted on its own share; x is the module's input."""
    pieces: list[tuple[int, Tensor]] = []
    changed = dict(plan.rest)
    stream = None if scope.forward is None else scope.forward.streams.get(scope.site.path)
    stream = None if stream is None else scope.layout.to_units(stream, stream.shape[-1])
    for number in range(len(scope.layout.partition.shares)):
        spans = scope.spans(number, len(y))
        if number not in changed:
            pieces += [(start, y[start:stop]) for start, stop in spans]
            continue
        own_x, own_stream = (None if t is None else taken(t, spans) for t in (x, stream))
        made = _chained(changed[number], scope, number, own_x, own_stream, taken(y, spans), len(y))
        sizes = [stop - start for start, stop in spans]
        # A part of a split cannot be written into, which some bases do.
        parts = [made] if len(spans) == 1 else made.split(sizes)
        pieces += [(start, part) for (start, _), part in zip(spans, parts, strict=True)]
    return in_order(pieces)


def _chained(
    acts: Sequence[Act], scope: Scope, number: int, x: Tensor | None, stream: Tensor | None, y: Tensor, vectors: int
) -> Tensor:
    """Chained acts take one another's output; weighted ones each take the base's, and what they change adds up."""
    out = y
    for act in acts:
        site = act.part.sites[scope.site.path]
        scope.lay_out([act.adapter], y.dtype)
        tokens = ShareTokens(scope, act, number, vectors)
        start = out if act.weight is None else y
        seen = stream if site.kind == "sublayer" else x
        if seen is None:
            raise unseen(site)
        method = act.part.method
        if method.has_form():
            form = act.part.form(site.path, y.dtype, scope.cache)
            dropped = seen if site.is_embedding else tokens.dropout(seen, method.form_dropout())  # ids have no shares
            new = applied(form, site, dropped, seen, start)
        else:
            new = method.output(act.part.at(site.path, y.dtype, scope.cache), seen, start, site, tokens)
        out = new if act.weight is None else out + act.weight * (new - y)
    return out


def unseen(site: Site) -> UsageError:
    """What to raise at a sublayer whose residual stream no hook has seen."""
    return UsageError(
        f"what {site.path} adds to was not seen in this forward", "Choose other layers, or a method without it."
    )


def applied(form: LinearForm, site: Site, dropped: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y (n, out) through one form; `dropped` is x (n, in), or ids (n,), as D sees it."""
    if site.kind == "norm":
        y = site.normalised(x)
    if form.down is not None and form.up is not None:
        low = F.embedding(x, form.down.t()) if site.is_embedding else dropped.to(y.dtype) @ form.down.t()
        low = low if form.middle is None else low * form.middle
        added = (low @ form.up.t()) * form.scale
        y = y + (added if form.outer is None else added * form.outer)
    if form.out_scale is not None:
        y = (y * form.out_scale).to(y.dtype)
    return y if form.shift is None else (y + form.shift).to(y.dtype)


def input_scales(plan: SitePlan, scope: Scope, dtype: torch.dtype) -> dict[int, Tensor]:
    """What the input (..., in) of each share of the plan's `scaled` is multiplied with, (in,)."""
    scales: dict[int, Tensor] = {}
    for number, acts in plan.scaled:
        scope.lay_out([act.adapter for act in acts], dtype)
        for act in acts:
            if not act.part.method.has_form():
                continue
            scale = act.part.form(scope.site.path, dtype, scope.cache).in_scale
            if scale is None:
                continue
            scale = scale if act.weight is None else 1 + act.weight * (scale - 1)
            scales[number] = scales[number] * scale if number in scales else scale
    return scales


def scaled_input(plan: SitePlan, scope: Scope, x: Tensor) -> Tensor:
    """x, of whatever shape, with the shares of the plan's `scaled` multiplied by the input scales of their forms."""
    flat, scales = scope.layout.to_units(x, x.shape[-1]), input_scales(plan, scope, x.dtype)
    pieces = []
    for number in range(len(scope.layout.partition.shares)):
        for start, stop in scope.spans(number, len(flat)):
            piece = flat[start:stop]
            pieces.append((start, piece * scales[number] if number in scales else piece))
    return scope.layout.from_units(in_order(pieces), x)
