"""The acts of one share after another: chained, weighted and formless methods, and sites that are no linear layers."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.batch.forward import Forward
from inlay.batch.layout import Unit
from inlay.batch.noise import Dropper
from inlay.batch.partition import in_order
from inlay.batch.route import Route
from inlay.errors import UsageError
from inlay.methods.contract import LinearForm, Site

from .adapter import Adapter
from .invoking import behind_sequence
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
        scale = vectors // self.layout.partition.total
        spans = self.layout.partition.shares[number].spans
        return spans if scale == 1 else tuple((a * scale, b * scale) for a, b in spans)

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

    def chance(self, like: Tensor, of_step: bool = False) -> Tensor | None:
        dropper = self._scope.dropper(self._act, self._number, self._vectors)
        if dropper is None or isinstance(dropper, Dropper):
            return None if dropper is None else dropper.chance(like, of_step)
        if of_step:
            what = f"{self._act.part.method.title} draws by the step, and nothing says which step this is"
            raise UsageError(what, "Train it in Inlay's loop, or route it with `noise`.")
        counts = [count for *_, count in self._units]
        return torch.rand(len(counts), 1, device=like.device).repeat_interleave(torch.tensor(counts).to(like.device), 0)

    @property
    def _units(self) -> Sequence[Unit]:
        """The rows or segments of the share."""
        layout = self._scope.layout
        return layout.samples(layout.partition.shares[self._number].members, self._vectors // layout.partition.total)

    def behind(self, sequence: Sequence[int]) -> Tensor:
        ids, spans = getattr(self._whole, "ids", None), self._scope.spans(self._number, self._vectors)
        told = ids is not None and ids.numel() == self._vectors and self._scope.layout.positions() is not None
        own = taken(ids.flatten(), spans) if told and ids is not None else None
        spot, counts = ("behind", tuple(sequence), self._act.part), [count for *_, count in self._units]
        return behind_sequence(self._whole, self._memories, spot, sequence, own, self.position, counts)

    @property
    def _memories(self) -> Sequence[MutableMapping[Any, Any]]:
        """What is known of the prompt of each row of the share: its own memory, or a place in the values of a cache."""
        own, cache = getattr(self._whole, "memories", None), self._scope.cache
        return [cache.setdefault(("memory", m), {}) if own is None else own[m] for m, *_ in self._units]

    @property
    def _whole(self) -> Any:
        """The layout of the whole forward."""
        return getattr(self._scope.layout, "layout", self._scope.layout)

    def prompt_mean(self, x: Tensor) -> Tensor:
        counts = torch.tensor([count for *_, count in self._units])
        row = torch.arange(len(counts)).repeat_interleave(counts).to(x.device)
        position, last = self.position.to(x.device), self.length.to(x.device).clamp(min=1) - 1
        inside = (position >= 0) & (position <= last)
        spot, memories, layout = ("prompt mean", self._act.part, self._scope.site.path), self._memories, self._whole
        held = torch.tensor([spot in memory for memory in memories], device=x.device)
        begins = ~held if hasattr(layout, "memories") else torch.full_like(held, not layout.continued)
        reads = _summed(inside[:, None], row, len(counts))[:, 0] > 0
        ends = _summed((position == last)[:, None], row, len(counts))[:, 0] > 0
        empty = _summed((position >= 0)[:, None], row, len(counts))[:, 0] == 0
        if not bool(torch.where(begins, ends | empty, held & ~reads).all()):
            what = f"{self._act.part.method.title} takes the mean of a row's prompt, which is not here as a whole"
            raise UsageError(what, "Run each prompt in one call, and go on from the cache that it filled.")
        if bool(begins.any()):  # sums of many tokens need more digits than half precision has
            exact = x if x.dtype == torch.float64 else x.float()
            total = _summed(torch.where(inside[:, None], exact, 0), row, len(counts))
            means = (total / _summed(inside[:, None], row, len(counts)).clamp(min=1)).to(x.dtype)
            for memory, mean, new in zip(memories, means, begins.tolist(), strict=True):
                if new:
                    memory[spot] = mean
        return torch.stack([memory[spot] for memory in memories])[row]


def _summed(x: Tensor, row: Tensor, rows: int) -> Tensor:
    """The sums (rows, width) of x (n, width), numbers or truths, over the tokens of each row."""
    x = x if x.is_floating_point() else x.long()
    return x.new_zeros(rows, x.shape[1]).index_add(0, row, x)


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
        seen = stream if site.kind in ("sublayer", "attended") else x
        if seen is None:
            raise unseen(site)
        method, params = act.part.method, act.params(site.path, y.dtype, scope.cache)
        if method.has_form():
            form = method.form(params, site).cast(y.dtype)
            dropped = seen if site.is_embedding else tokens.dropout(seen, method.form_dropout())  # ids have no shares
            new = applied(form, site, dropped, seen, start)
        elif method.uses:
            made = [_chained(used, scope, number, x, stream, start, vectors) for used in act.over]
            new = method.fuse(params, seen, start, made, site, tokens)
        else:
            new = method.output(params, seen, start, site, tokens)
        out = new if act.weight is None else out + act.weight * (new - y)
    return out


def unseen(site: Site) -> UsageError:
    """What to raise at a sublayer whose residual stream no hook has seen, or at attention whose queries none has."""
    what = "the queries of" if site.kind == "attended" else "what"
    adds = "were" if site.kind == "attended" else "adds to was"
    return UsageError(
        f"{what} {site.path} {adds} not seen in this forward", "Choose other layers, or a method without it."
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
    """x, of whatever shape, with the shares of the plan's `scaled` multiplied by the input scales of their forms, and
    changed by the methods that have an `input`."""
    flat, scales = scope.layout.to_units(x, x.shape[-1]), input_scales(plan, scope, x.dtype)
    changing = {n: act for n, acts in plan.scaled for act in acts if act.part.method.has("input")}
    pieces = []
    for number in range(len(scope.layout.partition.shares)):
        spans = scope.spans(number, len(flat))
        own = [flat[start:stop] * scales[number] if number in scales else flat[start:stop] for start, stop in spans]
        if number in changing and own:
            whole = own[0] if len(own) == 1 else torch.cat(own)
            own = _changed(changing[number], scope, number, whole, len(flat)).split([len(piece) for piece in own])
        pieces += [(start, piece) for (start, _), piece in zip(spans, own, strict=True)]
    return scope.layout.from_units(in_order(pieces), x)


def _changed(act: Act, scope: Scope, number: int, x: Tensor, vectors: int) -> Tensor:
    """x (n, in) of a share, as a method with an `input` has the module read it."""
    params = act.part.at(scope.site.path, x.dtype, scope.cache)
    tokens = ShareTokens(scope, act, number, vectors)
    made = act.part.method.input(params, x, act.part.sites[scope.site.path], tokens)
    return made if act.weight is None else x + act.weight * (made - x)
