"""Hooks on single modules: each part of an activation gets the methods of its own adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inlay.batch.call import Call, current
from inlay.batch.noise import Dropper, Noise
from inlay.batch.padded import PaddedCall
from inlay.batch.portions import Part, Portions
from inlay.errors import UsageError
from inlay.methods.contract import Method, Site, Structure

from .adapter import Adapter, stacked
from .calls import Route
from .residual import Residuals

__all__ = ["SiteHooks"]

WASTE = 1 / 8
"""Share of padding up to which adapters that are computed together take the base's product along."""


class SiteHooks:
    """Hooks the modules that adapters act on, once each, and applies whatever the route in force says."""

    def __init__(self, base: Structure, adapters: dict[str, Adapter], route: Callable[[], Route | None]) -> None:
        self.base, self.adapters, self._route = base, adapters, route
        self.residuals = Residuals(base)
        self._users: dict[str, list[str]] = {}  # path of a hooked module -> adapters that act there
        self._taken: dict[str, Tensor] = {}  # inputs of modules that run without gradients
        self._handles: list[RemovableHandle] = []

    def add(self, adapter: Adapter) -> None:
        for site in adapter.sites.values():
            if site.kind in ("attention", "embedding"):
                continue  # those act through the call, not through a module
            if site.kind == "sublayer":
                self.residuals.watch()
            if site.path not in self._users:
                self._users[site.path] = []
                self._hook(site)
            self._users[site.path].append(adapter.name)

    def forget(self, name: str) -> None:
        for users in self._users.values():
            if name in users:
                users.remove(name)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.residuals.remove()
        self._users.clear()

    def _hook(self, site: Site) -> None:
        path = site.path

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args:
                return None
            self._taken.pop(path, None)  # what a call that broke off left behind
            changed = self._applied(path, None, args[0])
            x = args[0] if changed is None else changed
            if self._takes_product(path, module, x):
                self._taken[path], changed = x, x.detach()
            return None if changed is None else (changed, *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
            value = y[0] if isinstance(y, tuple) else y
            x = self._taken.pop(path, None)
            frozen = None if x is None else module.weight
            changed = self._applied(path, x if x is not None else args[0] if args else value, value, frozen)
            if changed is None:
                return None
            return (changed, *y[1:]) if isinstance(y, tuple) else changed

        self._handles += [site.module.register_forward_pre_hook(before), site.module.register_forward_hook(after)]

    def _takes_product(self, path: str, module: nn.Module, x: Tensor) -> bool:
        """Whether the only adapter in force, or the only computation of many, gives x the gradient of the base's own
        product too, in one pass with its own; the base then runs without gradients."""
        route, call = self._route(), current()
        if route is None or call is None or call.owner is not self.adapters:
            return False
        if not (torch.is_grad_enabled() and x.requires_grad) or torch.is_autocast_enabled(x.device.type):
            return False
        blend = call.portions.parts[0].blend
        if len(blend) != 1 or blend[0][1] is not None:
            return False
        adapter = self.adapters[blend[0][0]]
        if path not in adapter.sites or not adapter.method.takes_product:
            return False
        frozen = type(module) is nn.Linear and not module.weight.requires_grad and _untouched(module)
        return frozen and self._at_once(path, call, route)

    def _applied(self, path: str, x: Tensor | None, value: Tensor, frozen: Any = None) -> Tensor | None:
        """The site's new input (where x is None) or output; None where no adapter in force acts here.

        `frozen` is the base's weight where its gradient is left to the adapter.
        """
        route = self._route()
        if route is None or not self._users[path] or not value.is_floating_point():
            return None
        users = self._users[path]
        if not any(name in users for blend in route.blends for name, _ in blend):
            return None
        if x is None and not any(self._changes_input(name, path) for name in users):
            return None
        call = current()
        inside = call if call is not None and call.owner is self.adapters else None
        residual = self.residuals.of(path)
        only = None if inside is None else self._only(path, inside, route)
        if only is not None:
            return self._blended(only, path, x, value, residual, inside, route, x is not None, frozen)
        portions, unfolded = _cut(inside, route, value)
        groups = self._groups(path, portions, route)
        pieces = portions.split(unfolded, groups)
        inputs, streams = (
            [None] * len(groups) if t is None else portions.split(_cut(inside, route, t)[1], groups)
            for t in (x, residual)
        )
        made = [
            self._blended(portions.parts[group[0]], path, own, piece, stream, inside, route)
            if len(group) == 1
            else self._together(group, portions, path, own, piece, stream, route.held, frozen)
            for group, own, piece, stream in zip(groups, inputs, pieces, streams, strict=True)
        ]
        joined = portions.join(made, groups)
        return joined.reshape(value.shape) if inside is None else inside.fold(joined, value)

    def _only(self, path: str, call: Call, route: Route) -> Part | None:
        """The one part that all tokens belong to, where nothing needs them cut."""
        return None if len(call.portions.parts) > 1 or self._drops(self._users[path], route) else call.portions.parts[0]

    def _at_once(self, path: str, call: Call, route: Route) -> bool:
        """Whether one computation serves all tokens, and pads few."""
        if self._only(path, call, route) is not None:
            return True
        groups = self._groups(path, call.portions, route)
        return len(groups) == 1 and len(groups[0]) > 1 and call.portions.waste(groups[0]) <= WASTE

    def _drops(self, users: list[str], route: Route) -> bool:
        """Whether dropout is on at a site, whose masks belong to rows and segments."""
        return route.noise is not None and any(getattr(self.adapters[u].method, "dropout", 0.0) for u in users)

    def _groups(self, path: str, portions: Portions, route: Route) -> list[list[int]]:
        """Numbers of parts, those together that one computation can serve: adapters with the same settings, alone."""
        groups: list[list[int]] = []
        methods: list[Method | None] = []
        alone = self._drops(self._users[path], route)
        for number, part in enumerate(portions.parts):
            adapter = self.adapters[part.blend[0][0]] if len(part.blend) == 1 and part.blend[0][1] is None else None
            method = None if alone or adapter is None or path not in adapter.sites else adapter.method
            if method is not None and method in methods:
                groups[methods.index(method)].append(number)
            else:
                groups.append([number])
                methods.append(method)
        return groups

    def _together(
        self, group: list[int], portions: Portions, path: str, x: Tensor | None, value: Tensor, stream: Tensor | None,
        held: dict[Any, Any], frozen: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """New input or output of adapters with the same settings, whose tokens stand one behind the other."""
        adapters = [self.adapters[portions.parts[n].blend[0][0]] for n in group]
        site, method = adapters[0].sites[path], adapters[0].method
        params = stacked(adapters, path, value.dtype, held)
        params.may_overwrite, params.frozen = x is not None and len(group) == len(portions.parts), frozen
        start = portions.together(value, group)
        if x is None:
            new = method.inputs(params, start, site)
        else:
            seen = stream if site.kind == "sublayer" else x
            assert seen is not None
            new = method.outputs(params, portions.together(seen, group), start, site)
        return portions.apart(new, group)

    def _changes_input(self, name: str, path: str) -> bool:
        adapter = self.adapters[name]
        return adapter.method.changes_input(adapter.sites[path])

    def _blended(
        self, part: Part, path: str, x: Tensor | None, value: Tensor, stream: Tensor | None, call: Call | None,
        route: Route, spare: bool = False, frozen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Stacked adapters see one another's result; weighted ones each see the base's, and their changes add up."""
        out = value
        here = [(name, weight) for name, weight in part.blend if path in self.adapters[name].sites]
        spare = spare and all(weight is None for _, weight in here)
        # A sublayer's adapters stand behind those of its last projection.
        for name, weight in sorted(here, key=lambda entry: self.adapters[entry[0]].sites[path].kind == "sublayer"):
            adapter = self.adapters[name]
            site, method = adapter.sites[path], adapter.method
            params = adapter.at(path, value.dtype, route.held)
            params.dropper = self._dropper(adapter, path, part, call, route, value)
            params.may_overwrite, params.frozen = spare, frozen
            start = out if weight is None else value
            if x is None:
                new = method.input(params, start, site)
            elif site.kind == "sublayer":
                assert stream is not None
                new = method.output(params, stream, start, site)
            else:
                new = method.output(params, x, start, site)
            out = new if weight is None else out + weight * (new - value)
        return out

    def _dropper(
        self, adapter: Adapter, path: str, part: Part, call: Call | None, route: Route, value: Tensor
    ) -> Dropper | None:
        noise: Noise | None = route.noise
        if noise is None or not getattr(adapter.method, "dropout", 0.0):
            return None
        if isinstance(call, PaddedCall):
            units = [(noise.samples[u], int(call.lead[u]), value.shape[1]) for u in part.units]
        elif route.lengths is not None:
            sizes = route.lengths if call is None else call.lengths  # pyright: ignore[reportAttributeAccessIssue]
            units = [(noise.samples[u], 0, sizes[u]) for u in part.units]
        else:
            units = [(noise.samples[u], 0, value.shape[1]) for u in part.units]
        return Dropper(adapter.seed, path, noise.step, units)


def _untouched(module: nn.Module) -> bool:
    """Whether nobody else looks at what goes in, comes out, or flows back."""
    return len(module._forward_hooks) == len(module._forward_pre_hooks) == 1 and not (
        module._backward_hooks or module._backward_pre_hooks
    )


def _cut(call: Call | None, route: Route, value: Tensor) -> tuple[Portions, Tensor]:
    """How dimension 0 is cut, and the activation (or ids) unfolded for it; behind the stacks the route says it."""
    width = value.shape[-1] if value.is_floating_point() else None
    if call is not None:
        return call.portions, call.unfold(value, width)
    tokens = value.numel() // (width or 1)
    if route.lengths is None:
        rows = len(route.blends)
        if tokens % rows:
            raise UsageError(f"the route has {rows} rows but {tokens} tokens came", "Give one entry for each row.")
        return Portions(route.blends), value.reshape(rows, -1, width) if width else value.reshape(rows, -1)
    for sizes in (route.kept, route.lengths):
        if sizes is not None and sum(sizes) == tokens:
            return Portions(route.blends, sizes), value.reshape(-1, width) if width else value.reshape(-1)
    raise UsageError(f"{tokens} tokens behind the stack belong to no segment", "Give `kept` with the segments.")
