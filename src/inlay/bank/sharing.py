"""Layers that read the same x in training: the first of them computes what D gives for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.shared_down import Joint, shared_down
from inlay.methods.contract import LinearForm

from .acting import Scope
from .adapter import Adapter
from .plan import SitePlan, plan_at

__all__ = ["forms_at", "shared_low"]

Forms = dict[int, LinearForm]
"""By the number of a share."""


@dataclass(eq=False)
class _Shared:
    """The forms of each layer that reads `x`, what D gives there, and the layers that have not run yet."""

    x: Tensor
    dtype: torch.dtype
    forms: Mapping[str, Forms]
    lows: Mapping[str, Tensor]
    left: set[str]


def forms_at(plan: SitePlan, scope: Scope, dtype: torch.dtype) -> Forms:
    """The forms of a plan's shares, in the dtype of the computation."""
    scope.lay_out([act.adapter for _, act in plan.forms], dtype)
    return {number: act.part.form(scope.site.path, dtype, scope.cache) for number, act in plan.forms}


def shared_low(
    plan: SitePlan, scope: Scope, x: Tensor, dtype: torch.dtype, same_input: Sequence[str],
    adapters: Mapping[str, Adapter],
) -> tuple[Forms, Tensor] | None:  # fmt: skip
    """The forms at this site, and x D^T (T, the largest rank) of all of them that drop nothing of x (..., in), which
    the sites `same_input` read too. None where there is nothing to share."""
    if scope.forward is None or len(same_input) < 2 or plan.scaled or not torch.is_grad_enabled():
        return None
    path, inputs = scope.site.path, scope.forward.inputs
    spot: Any = "shared", same_input
    held: _Shared | None = inputs.pop(spot, None)
    # A block that is computed again begins anew, even where the time before broke off between its layers.
    if held is None or held.x is not x or held.dtype != dtype or path not in held.left:
        held = _begin(scope, x, dtype, same_input, adapters)
    if held is None:
        return None
    held.left.discard(path)
    if held.left:  # held no longer than it is needed: x is a block's activation
        inputs[spot] = held
    return (held.forms[path], held.lows[path]) if path in held.lows else None


def _begin(
    scope: Scope, x: Tensor, dtype: torch.dtype, same_input: Sequence[str], adapters: Mapping[str, Adapter]
) -> _Shared | None:
    """None where fewer than two of the sites have something to share."""
    plans = {path: plan_at(path, scope.route, scope.layout.blends, adapters) for path in same_input}
    found = {path: plan for path, plan in plans.items() if plan is not None and plan.forms and not plan.scaled}
    if len(found) < 2:
        return None
    scope.lay_out([act.adapter for plan in found.values() for _, act in plan.forms], dtype)
    forms = {
        path: {n: act.part.form(path, dtype, scope.cache) for n, act in plan.forms} for path, plan in found.items()
    }
    downs = {
        path: {n: forms[path][n].down for n, act in plan.forms if not scope.masked(act)} for path, plan in found.items()
    }
    paths = [path for path in found if any(down is not None for down in downs[path].values())]
    numbers = dict.fromkeys(n for path in paths for n, down in downs[path].items() if down is not None)
    if not numbers:
        return None
    vectors = x.numel() // x.shape[-1]
    joints = [Joint(scope.spans(n, vectors), tuple(downs[path].get(n) for path in paths)) for n in numbers]
    with torch.autocast(x.device.type, enabled=False):
        lows = shared_down(x.to(dtype), joints)
    return _Shared(x, dtype, forms, dict(zip(paths, lows, strict=True)), set(found))
