"""Adapters of few tokens each, as when text is written: laid out once for all steps, then one product for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.bags import Bags, Factors, units
from inlay.methods.contract import LinearForm

from .acting import Scope
from .adapter import Adapter
from .plan import SitePlan, plan_at

__all__ = ["FEW", "act_on_few", "suits"]

FEW = 4
"""Tokens of a row up to which a bag of its own is faster than a product of its rows (benchmarks/kernel_speed.py)."""
MANY = 3
"""Adapters from which on products one by one are slower."""

Forms = Mapping[int, LinearForm]
"""By the number of a share."""


def suits(plan: SitePlan, scope: Scope, vectors: int) -> bool:
    """Whether many adapters meet few tokens, without gradients and inside the backbone."""
    if torch.is_grad_enabled() or scope.forward is None or scope.forward.behind or len(plan.forms) < MANY:
        return False
    return vectors <= FEW * len(scope.layout.blends)


def act_on_few(
    plan: SitePlan, scope: Scope, x: Tensor, y: Tensor, same_input: Sequence[str], adapters: Mapping[str, Adapter]
) -> Tensor:
    """y (vectors, out) with the forms of all shares applied to x (vectors, in), which the sites `same_input` read."""
    assert scope.forward is not None
    path, cache, inputs = scope.site.path, scope.cache, scope.forward.inputs
    if ("few", path, len(x)) not in cache:
        _lay_out(plan, scope, x, y, same_input, adapters)
    held: _Few = cache["few", path, len(x)]
    if held.bags is not None:
        low = inputs.pop(("low", id(held.bags)), None) if held.layer else None
        low = held.bags.low(x) if low is None else low
        if not held.last:
            inputs["low", id(held.bags)] = low  # pyright: ignore[reportArgumentType]
        y = y + held.bags.high(low, held.layer)
    y = y if held.scale is None else (y * held.scale).to(y.dtype)
    return y if held.shift is None else (y + held.shift).to(y.dtype)


@dataclass(frozen=True, eq=False)
class _Few:
    """What one site needs at every step: bags, in which it is the layer number `layer`, and the scale and shift of each
    vector (vectors, out)."""

    bags: Bags | None
    layer: int
    last: bool
    scale: Tensor | None
    shift: Tensor | None


def _lay_out(
    plan: SitePlan, scope: Scope, x: Tensor, y: Tensor, same_input: Sequence[str], adapters: Mapping[str, Adapter]
) -> None:
    """Fill the cache for this site, and with it for those that read the same x and have the same shares and units."""
    forms = {path: _forms(path, scope, y.dtype, adapters) for path in dict.fromkeys((scope.site.path, *same_input))}
    own = {path: _ranks(found) for path, found in forms.items()}
    alike = [path for path in same_input if own[path] == own[scope.site.path]] or [scope.site.path]
    bags = _bags(scope, [forms[path] for path in alike], len(x)) if own[scope.site.path] else None
    for layer, path in enumerate(alike):
        scale, shift = (_rows(scope, forms[path], name, len(x)) for name in ("out_scale", "shift"))
        scope.cache["few", path, len(x)] = _Few(bags, layer, path == alike[-1], scale, shift)


def _forms(path: str, scope: Scope, dtype: torch.dtype, adapters: Mapping[str, Adapter]) -> Forms:
    plan = plan_at(path, scope.route, scope.layout.blends, adapters)
    return {} if plan is None else {n: act.part.form(path, dtype, scope.cache) for n, act in plan.forms}


def _ranks(forms: Forms) -> dict[int, int]:
    return {number: units(len(form.down)) for number, form in forms.items() if form.down is not None}


def _bags(scope: Scope, layers: Sequence[Forms], vectors: int) -> Bags:
    """Slots in the order of the shares; those of one adapter one behind the other."""
    numbers = [number for number, form in layers[0].items() if form.down is not None]
    slots: list[Any] = [()] * vectors
    first = 0
    for number in numbers:
        down = layers[0][number].down
        assert down is not None
        own = tuple(range(first, first + units(len(down))))
        first += len(own)
        for start, stop in scope.spans(number, vectors):
            slots[start:stop] = [own] * (stop - start)
    return Bags.of(slots, [[_factors(forms[number]) for number in numbers] for forms in layers])


def _factors(form: LinearForm) -> Factors:
    assert form.down is not None and form.up is not None
    down = form.down if form.middle is None else form.down * form.middle[:, None]
    return down, form.up if form.outer is None else form.up * form.outer[:, None], form.scale


def _rows(scope: Scope, forms: Forms, name: str, vectors: int) -> Tensor | None:
    """The scales or shifts of all vectors (vectors, out); None where there are none."""
    found = {number: value for number, form in forms.items() if (value := getattr(form, name)) is not None}
    if not found:
        return None
    like = max(found.values(), key=lambda value: torch.finfo(value.dtype).bits)
    rows = like.new_full((vectors, len(like)), 1.0 if name == "out_scale" else 0.0)
    for number, value in found.items():
        for start, stop in scope.spans(number, vectors):
            rows[start:stop] = value
    return rows
