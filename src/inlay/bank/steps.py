"""Steps that go on from a cache of keys and values: what a site does there is found at the first of them and kept in
the cache's own values, so that later steps only compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.batch.forward import Forward
from inlay.methods.contract import BottleneckForm, LinearForm, Site

from .acting import Scope, act_in_turn, input_scales, scaled_input
from .adapter import Adapter
from .plan import Act, SitePlan, plan_at
from .slot_scales import norm_act
from .slots import Forms, StepAct, beside, linear_acts, placed_acts

__all__ = ["InputStep", "Step", "fresh", "goes_on", "input_step", "step_of"]

InputStep = Callable[[Forward, Tensor], Tensor]
"""Makes of x (..., in) what a module reads, in the forward of one step."""

FEW = 4
"""Tokens of a row up to which steps of linear layers are laid out; more are a prompt that goes on."""
SPREAD = 256
"""The same for norms and sublayers: a norm of a query's heads has a vector for each head."""


def goes_on(forward: Forward) -> bool:
    """Whether a forward goes on from what was read before, without gradients, noise and autocast."""
    return (
        not forward.training
        and forward.layout.continued
        and forward.route.noise is None
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(forward.layout.device.type)
    )


@dataclass(frozen=True, eq=False)
class Step:
    """What one site does at every step: `acts` first, then the `rest`, which has to be found anew."""

    site: Site
    acts: Sequence[StepAct]
    rest: SitePlan | None

    @property
    def idle(self) -> bool:
        return not self.acts and self.rest is None

    def __call__(self, forward: Forward, x: Tensor | None, y: Tensor, fresh: Tensor | None) -> Tensor:
        """y (..., width), changed; written into `fresh`, which is y, where nobody else holds it. x is the module's
        input."""
        flat = None if x is None else x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
        made = y.reshape(-1, y.shape[-1])
        if self.acts:
            made = made.clone() if fresh is None else fresh.view(made.shape)
            for act in self.acts:
                act(made, flat, forward)
        if self.rest is not None:
            scope = Scope(self.site, forward.route, forward.layout, forward, forward.drops)
            made = act_in_turn(self.rest, scope, flat, made)
        return made.reshape(y.shape)


def step_of(
    plan: SitePlan, scope: Scope, y: Tensor, same_input: Sequence[str], adapters: Mapping[str, Adapter]
) -> Step | None:
    """The step of one site, and on the way those of the sites `same_input`, which read the same x; None where there are
    too many vectors y (..., width), or a head's modules act."""
    path, vectors = scope.site.path, len(scope.layout.to_units(y, y.shape[-1]))
    rows = scope.layout.partition.total
    kinds = {act.part.sites[path].kind for _, acts in plan.rest for act in acts}
    if "head" in kinds or vectors > rows * (FEW if plan.forms else SPREAD) or not scope.layout.in_order(y):
        return None
    acts = _linear(plan, scope, y, vectors, same_input, adapters) if plan.forms else []
    norms: dict[int, LinearForm] = {}
    bottlenecks: dict[int, BottleneckForm] = {}
    rest: list[tuple[int, Sequence[Act]]] = []
    for number, own in plan.rest:
        form = _form(own, scope, y.dtype)
        if isinstance(form, LinearForm):
            norms[number] = form
        elif isinstance(form, BottleneckForm):
            bottlenecks[number] = form
        else:
            rest.append((number, own))
    if norms:
        acts.append(norm_act(scope, _site(plan, norms, path), norms, vectors))
    if bottlenecks:
        acts += beside(scope, _site(plan, bottlenecks, path), bottlenecks, vectors)
    return Step(scope.site, acts, SitePlan((), rest, ()) if rest else None)


def _form(acts: Sequence[Act], scope: Scope, dtype: torch.dtype) -> LinearForm | BottleneckForm | None:
    """What a share does, where that is one act alone that can be computed together with those of other shares."""
    act = acts[0]
    if len(acts) > 1 or act.weight is not None:
        return None
    method, path = act.part.method, scope.site.path
    kind = act.part.sites[path].kind
    if kind == "sublayer":
        return method.bottleneck(act.part.at(path, dtype, scope.cache), act.part.sites[path])
    form = act.part.form(path, dtype, scope.cache) if kind == "norm" and method.has_form() else None
    return form if form is not None and form.down is None and form.up is None else None


def _site(plan: SitePlan, forms: Mapping[int, object], path: str) -> Site:
    """The site as these shares have it: a module may be one of several kinds."""
    return next(acts[0].part.sites[path] for number, acts in plan.rest if number in forms)


def _linear(
    plan: SitePlan, scope: Scope, y: Tensor, vectors: int, same_input: Sequence[str], adapters: Mapping[str, Adapter]
) -> list[StepAct]:
    """The acts of the forms; those of other layers that read the same x wait in the cache."""
    path, cache = scope.site.path, scope.cache
    spot = "acts", path, vectors, y.dtype
    if spot not in cache:
        owners = {n: act.adapter for n, act in plan.forms}
        found = _placed(plan, scope, y.dtype, owners, vectors, same_input, adapters)
        if found is None:
            found = linear_acts(scope, _layers(plan, scope, y.dtype, same_input, adapters), path, vectors, owners)
        for other, acts in found.items():
            cache["acts", other, vectors, y.dtype] = acts
    return list(cache[spot])


def _layers(
    plan: SitePlan, scope: Scope, dtype: torch.dtype, same_input: Sequence[str], adapters: Mapping[str, Adapter]
) -> dict[str, Forms]:
    """The forms of a site, and of those that read the same x, where the products of each share are the same adapter's
    at all: tables hold them by adapter."""
    path, found, owners = scope.site.path, dict[str, Forms](), dict[str, dict[int, Adapter]]()
    for other in dict.fromkeys((*same_input, path)):
        own = plan if other == path else plan_at(other, scope.route, scope.layout.blends, adapters)
        if own is not None and (other == path or not (own.scaled or plan.scaled)):
            forms = found[other] = {n: act.part.form(other, dtype, scope.cache) for n, act in own.forms}
            owners[other] = {n: act.adapter for n, act in own.forms if forms[n].down is not None}
    return {other: forms for other, forms in found.items() if owners[other] == owners[path]}


def _placed(
    plan: SitePlan, scope: Scope, dtype: torch.dtype, owners: Mapping[int, Adapter], vectors: int,
    same_input: Sequence[str], adapters: Mapping[str, Adapter],
) -> Mapping[str, list[StepAct]] | None:  # fmt: skip
    """The acts of a site and of those that read the same x, where the same adapters act at all of them that any acts
    at, and a table is there."""
    plans = {scope.site.path: plan}

    def form(path: str, number: int) -> LinearForm | None:
        own = plans.get(path)
        act = None if own is None else next((act for n, act in own.forms if n == number), None)
        return None if act is None else act.part.form(path, dtype, scope.cache)

    for other in same_input:
        own = plan_at(other, scope.route, scope.layout.blends, adapters)
        if own is None:
            continue
        if own.scaled or plan.scaled or {n: act.adapter for n, act in own.forms} != owners:
            return None
        plans[other] = own
    return placed_acts(scope, scope.site.path, dtype, owners, vectors, form)


def input_step(plan: SitePlan, scope: Scope, x: Tensor) -> InputStep | None:
    """What the plan's `scaled` do to x (..., in) at every step; None where nothing is scaled."""
    if any(act.part.method.has("input") for _, acts in plan.scaled for act in acts):
        site = scope.site
        return lambda forward, x: scaled_input(plan, Scope(site, forward.route, forward.layout, forward), x)
    rows = _input_rows(plan, scope, x)
    return None if rows is None else lambda _, x: x * rows


def _input_rows(plan: SitePlan, scope: Scope, x: Tensor) -> Tensor | None:
    """What x is multiplied with, in its shape."""
    flat = scope.layout.to_units(x, x.shape[-1])
    scales = input_scales(plan, scope, x.dtype)
    if not scales:
        return None
    rows = torch.ones_like(flat)
    for number, scale in scales.items():
        for start, stop in scope.spans(number, len(flat)):
            rows[start:stop] = scale
    return rows.view(x.shape)


def fresh(module: nn.Module, y: Tensor) -> Tensor | None:
    """The contiguous tensor that y is all of, where a plain linear layer has made it and nobody else holds it."""
    whole = y if y._base is None else y._base
    if type(module) is not nn.Linear or (torch.is_grad_enabled() and y.requires_grad):
        return None
    return whole if whole.numel() == y.numel() and whole.is_contiguous() and whole.shape[-1] == y.shape[-1] else None
