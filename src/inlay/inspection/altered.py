"""Methods that do one thing otherwise: with fewer virtual tokens or in another order, with products of a lower rank,
with their bottlenecks' units watched. They take the parameters of the method that they were made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.methods.contract import BottleneckForm, LinearForm, Method, Params, Site, Tokens

__all__ = ["cut", "keeping", "watched"]


def _altered(method: Method, changed: Mapping[str, Any]) -> Any:
    """`method` with some functions of its contract in the place of its class's own."""
    kind = type(type(method).__name__, (type(method),), dict(changed))
    made = object.__new__(kind)
    made.__dict__.update(vars(method))
    return made


def keeping(method: Method, order: Sequence[int]) -> Method:
    """`method` with those of its virtual tokens or prefix keys that `order` names, in that order."""
    chosen, kind = list(order), type(method)

    def virtual(self: Any, params: Params) -> Tensor:
        return kind.virtual(self, params)[chosen]

    def prefix(self: Any, params: Params, site: Site, index: int) -> tuple[Tensor, Tensor]:
        keys, values = kind.prefix(self, params, site, index)
        return keys[:, chosen], values[:, chosen]

    changed: dict[str, Any] = {}
    if method.virtual_length:
        changed |= {"virtual": virtual, "virtual_length": property(lambda self: len(chosen))}
    if method.prefix_length:
        changed |= {"prefix": prefix, "prefix_length": property(lambda self: len(chosen))}
    return _altered(method, changed)


def cut(method: Method, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Method:
    """`method` with the products D (r, in), U (out, r) of `factors`, by the path of a site, in the place of its own;
    scales and shifts stay."""
    kind = type(method)

    def form(self: Any, params: Params, site: Site) -> LinearForm:
        own = kind.form(self, params, site)
        if site.path not in factors:
            return own
        down, up = factors[site.path]
        return replace(own, down=down, up=up, scale=1.0, middle=None, outer=None)

    return _altered(method, {"form": form})


Hear = Callable[[Site, BottleneckForm, Tensor], None]


def watched(method: Method, hear: Hear) -> Method:
    """`method`, which tells `hear` the activity (n, r) of its units at a site in each forward."""
    kind = type(method)

    def output(self: Any, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        form = kind.bottleneck(self, params, site)
        if form is not None:
            with torch.no_grad():
                hear(site, form, form.activation(F.linear(form.read(x, y, site), form.down, form.down_bias)))
        return kind.output(self, params, x, y, site, tokens)

    def bottleneck(self: Any, params: Params, site: Site) -> BottleneckForm | None:
        return None  # so that no kernel of many adapters takes it past `output`

    return _altered(method, {"output": output, "bottleneck": bottleneck})
