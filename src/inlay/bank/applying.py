"""Hooks on single modules: the methods of each token's own adapters act on what comes in and what goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.batch.forward import FORWARD, Forward
from inlay.kernels.low_rank import Product, low_rank
from inlay.kernels.scale_shift import Scaled, scale_shift
from inlay.kernels.standin import StandIn
from inlay.methods.contract import LinearForm, Site
from inlay.sites.observe import first_tensor
from inlay.sites.structure import Structure

from .acting import Scope, act_in_turn, scaled_input
from .adapter import Part
from .behind import Behind
from .experts import stand_in_for
from .heads import act_on_head
from .hooks import Hook
from .inside import Second, laid_out
from .lookup import Lookup
from .plan import SitePlan, plan_at
from .prefix_gates import gating_hook
from .ready import hooks_around, note_ready
from .resting import resting_at, rests
from .sharing import forms_at, shared_low
from .steps import InputStep, Step, fresh, input_step, step_of

__all__ = ["SiteHooks"]


class SiteHooks:
    """Hooks the modules that adapters act on, once each, and does there what the route in force says."""

    def __init__(self, base: Structure, bank: Lookup) -> None:
        self.base, self.bank = base, bank
        self._users: dict[str, int] = {}  # path of a hooked module -> how many parts act there
        self._hooks: list[Hook | StandIn] = []
        self._scaled: set[str] = set()  # paths of modules whose input some part scales or changes
        self._streams_watched = False
        self._gated: set[nn.Module] = set()  # attention modules whose prefixes some part gates
        self._blocks = {base.model.get_submodule(path) for path in base.blocks}
        self._mixtures: set[nn.Module] = set()  # whose forward has a stand-in
        self._rests = rests(base)

    def add(self, part: Part) -> None:
        for site in part.sites.values():
            if site.kind in ("attention", "tokens"):  # those act through the forward's layout, not through a module
                if part.method.has("prefix_gates") and site.module not in self._gated:
                    self._gated.add(site.module)
                    self._hooks.append(gating_hook(site, self.bank.adapters, self.bank, self.base.observed))
                continue
            if site.kind == "sublayer":
                self._watch_streams()
            if site.path not in self._users:
                self._users[site.path] = 0
                self._hook(site)
            self._users[site.path] += 1
            if part.method.scales_input(site) or part.method.has("input"):
                self._scaled.add(site.path)

    def forget(self, part: Part) -> None:
        for path in part.sites:
            if path in self._users:
                self._users[path] -= 1

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._users.clear()

    def _hook(self, site: Site) -> None:
        if site.kind == "experts":
            self._stand_in(site)
            return
        path = site.path

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._before(site, module, args, kwargs) if self._users.get(path) else None

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            return self._after(site, module, args, kwargs, out) if self._users.get(path) else None

        self._hooks += [Hook.before(site.module, before, named=True), Hook.after(site.module, after, named=True)]

    def _stand_in(self, site: Site) -> None:
        """One stand-in serves all matrices of a mixture's module."""
        if site.module not in self._mixtures:
            self._mixtures.add(site.module)
            sites = {own.name: own for own in self.base.experts if own.module is site.module}
            self._hooks.append(stand_in_for(self.base.mixtures[site.module], sites, self._scope))

    def _watch_streams(self) -> None:
        """Let forwards remember, for each sublayer, the residual stream that its output is added to."""
        if self._streams_watched:
            return
        self._streams_watched = True
        paths: dict[nn.Module, list[str]] = {}
        for path, module in self.base.observed.streams.items():
            paths.setdefault(module, []).append(path)
        for module, own in paths.items():

            def remember(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], own: Sequence[str] = tuple(own)
            ) -> None:
                forward = FORWARD.get()
                if forward is None or not forward.streamed or forward.owner is not self.bank:
                    return
                if (stream := first_tensor(args, kwargs)) is not None:
                    forward.streams.update((path, stream) for path in own)

            self._hooks.append(Hook.before(module, remember, first=True, named=True))

    def _scope(self, site: Site, value: Tensor) -> tuple[SitePlan, Scope] | None:
        """What acts on `value` at a site, and whose tokens it holds; None where nothing does."""
        forward: Forward | None = FORWARD.get()
        if forward is not None and forward.owner is not self.bank:
            forward = None
        route = forward.route if forward is not None else self.bank.route_here()
        if route is None or not any(route.blends):
            return None
        if forward is not None and not forward.behind:
            plan = plan_at(site.path, route, forward.layout.blends, self.bank.adapters)
            if plan is None:
                return None
            inner: Any = laid_out(forward.layout, site, value, self.base.observed)
            return plan, Scope(site, route, inner, forward, forward.drops)
        if plan_at(site.path, route, route.blends, self.bank.adapters) is None:
            return None
        width = value.shape[-1] if value.is_floating_point() else None
        drops = torch.is_grad_enabled() and self.base.model.training if forward is None else forward.drops
        before = None if forward is None else forward.before
        layout = Behind.of(route, value, width, forward is None) if before is None else before.of(site, value, width)
        plan = plan_at(site.path, layout.route, layout.blends, self.bank.adapters)
        return None if plan is None else (plan, Scope(site, layout.route, layout, forward, drops))

    def _before(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if site.path not in self._scaled and not torch.is_grad_enabled():
            return None
        x, forward = first_tensor(args, kwargs), FORWARD.get()
        if x is not None and forward is not None and forward.goes_on and forward.owner is self.bank:
            change = self._input_step(site, forward, x)
            return None if change is None else self._reading(forward, module, args, kwargs, x, change(forward, x))
        found = None if x is None else self._scope(site, x)
        if x is None or found is None:
            return None
        plan, scope = found
        changed = scaled_input(plan, scope, x) if plan.scaled else x
        if scope.forward is not None and self._rides_along(plan, scope, module, changed):
            scope.forward.inputs[site.path] = changed
            return _with_first(args, kwargs, x, changed.detach())
        return self._reading(scope.forward, module, args, kwargs, x, changed) if changed is not x else None

    def _reading(
        self, forward: Forward | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor,
        changed: Tensor,
    ) -> Any:  # fmt: skip
        """The arguments with `changed` for x; of a block, the streams that begin with x too."""
        if forward is not None and module in self._blocks:
            forward.streams.update({path: changed for path, stream in forward.streams.items() if stream is x})
        return _with_first(args, kwargs, x, changed)

    def _after(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        y = out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return None
        forward = FORWARD.get()
        if forward is not None and forward.goes_on and (step := self._step(site, forward, y)) is not None:
            x = first_tensor(args, kwargs)
            if x is not None and out is y and len(args) == 1 and not kwargs:
                note_ready(forward, module, x, forward.cache.get(_input_spot(site, x)), step)
            return None if step.idle else _instead(out, step(forward, x, y, fresh(module, y)))
        found = self._scope(site, y)
        if found is None:
            return None
        plan, scope = found
        if any(act.part.sites[site.path].kind == "head" for _, acts in plan.rest for act in acts):
            return act_on_head(plan, scope, args, kwargs, out)
        kept = None if scope.forward is None else scope.forward.inputs.pop(site.path, None)
        x = first_tensor(args, kwargs) if kept is None else kept
        resting = resting_at(scope.layout, x, y) if site.path in self._rests else None
        made = y
        if plan.forms:
            assert x is not None
            made = self._together(plan, scope, module, x, y, kept is not None)
        if plan.rest:
            width = None if x is None or not x.is_floating_point() else x.shape[-1]
            flat_x = None if x is None else scope.layout.to_units(x, width)
            flat = act_in_turn(plan, scope, flat_x, scope.layout.to_units(made, y.shape[-1]))
            made = scope.layout.from_units(flat, y)
        return _instead(out, made if resting is None else made.index_put(resting[:1], resting[1]))

    # ---- steps that go on from a cache

    def _step(self, site: Site, forward: Forward, y: Tensor) -> Step | None:
        """What the site does at every step; None where that has to be found anew."""
        spot = "step", site.path, y.shape, y.dtype
        if forward.owner is not self.bank:
            return None
        if spot not in forward.cache:
            found, same = self._scope(site, y), self.base.observed.same_input.get(site.path, ())
            made = Step(site, (), None) if found is None else step_of(*found, y, same, self.bank.adapters)
            forward.cache[spot] = made
        return forward.cache[spot]

    def _input_step(self, site: Site, forward: Forward, x: Tensor) -> InputStep | None:
        spot = _input_spot(site, x)
        if spot not in forward.cache:
            found = self._scope(site, x)
            forward.cache[spot] = input_step(*found, x) if found is not None and found[0].scaled else None
        return forward.cache[spot]

    # ---- linear layers

    def _rides_along(self, plan: SitePlan, scope: Scope, module: nn.Module, x: Tensor) -> bool:
        """Whether the gradient of the base's own product can be computed together with those of the adapters: then the
        base runs without one."""
        forward = scope.forward
        if scope.site.kind != "linear" or forward is None or not (torch.is_grad_enabled() and x.requires_grad):
            return False
        if torch.is_autocast_enabled(x.device.type) or type(module) is not nn.Linear:
            return False
        alone = hooks_around(module) == 1
        return bool(plan.forms) and not module.weight.requires_grad and not scope.site.quantized and alone

    def _together(
        self, plan: SitePlan, scope: Scope, module: nn.Module, x: Tensor, y: Tensor, rides_along: bool
    ) -> Tensor:
        """The output y (..., out) of a linear layer, changed by all forms at once."""
        if isinstance(scope.layout, Second):
            turn, turned = scope.layout.turn, replace(scope, layout=scope.layout.layout)
            return turn(self._together(plan, turned, module, turn(x), turn(y), rides_along))
        vectors = scope.layout.to_units(x, x.shape[-1])
        same = self.base.observed.same_input.get(scope.site.path, ())
        shared = shared_low(plan, scope, x, y.dtype, same, self.bank.adapters)
        forms, low = (forms_at(plan, scope, y.dtype), None) if shared is None else shared
        products, scaled = _computed(plan, scope, vectors, forms, low is not None)
        if products or rides_along:
            weight: Any = module.weight if rides_along else None
            own = fresh(module, y)
            with torch.autocast(y.device.type, enabled=False):
                into = y if own is None else own
                made = low_rank(x.to(y.dtype), into, products, weight, own is not None, low)
            y = made.view(y.shape)
        return scale_shift(y.view(-1, y.shape[-1]), scaled).view(y.shape) if scaled else y


def _computed(
    plan: SitePlan, scope: Scope, x: Tensor, forms: Mapping[int, LinearForm], shared: bool
) -> tuple[list[Product], list[Scaled]]:
    """The products and scales of all forms, over their spans of the flat x and y; where x D^T is `shared`, the products
    that drop nothing have no D."""
    products: list[Product] = []
    scaled: list[Scaled] = []
    for number, act in plan.forms:
        form, spans = forms[number], scope.spans(number, len(x))
        if form.down is not None and form.up is not None:
            mask = scope.mask(act, number, spans, x)
            down = None if shared and not scope.masked(act) else form.down
            products.append(Product(spans, form.scale, down, form.up, form.middle, form.outer, mask))
        if form.out_scale is not None or form.shift is not None:
            scaled.append(Scaled(spans, form.out_scale, form.shift))
    return products, scaled


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, changed: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with `changed` in the place of x."""
    return (
        tuple(changed if arg is x else arg for arg in args),
        {name: changed if value is x else value for name, value in kwargs.items()},
    )


def _instead(out: Any, made: Tensor) -> Any:
    """What a module gave, with `made` in the place of its first tensor."""
    if isinstance(out, list):
        return [made, *out[1:]]
    return (made, *out[1:]) if isinstance(out, tuple) else made


def _input_spot(site: Site, x: Tensor) -> tuple[object, ...]:
    """Where a forward's cache keeps what makes of x what the site reads."""
    return "input step", site.path, x.shape, x.dtype
