"""Heads that are adapters' own: each share's rows go through the module as its adapter has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from inlay.batch.partition import in_order
from inlay.errors import UsageError

from .acting import Scope
from .plan import Act, SitePlan

__all__ = ["act_on_head"]


def act_on_head(plan: SitePlan, scope: Scope, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
    """What a head gives, `out` (rows, ...) or a tuple that begins with it, where the rows of each share with a head of
    its own are replaced.

    Raises: UsageError where heads are chained, the batch is packed, or a head has another shape than the base's.
    """
    base: Tensor = out[0] if isinstance(out, tuple) else out
    partition, rows = scope.layout.partition, len(base)
    if len(partition.shares) > 1 and rows % partition.total:
        raise UsageError(f"{scope.site.path} takes whole rows, and these are packed", "Use padded rows and `route`.")
    changed, each = dict(plan.rest), rows // partition.total
    pieces: list[tuple[int, Tensor]] = []
    for number, share in enumerate(partition.shares):
        for first, last in share.spans:
            start, stop = first * each, last * each
            acts, own = changed.get(number), base[start:stop]
            if acts is not None:
                given = [_rows_of(value, rows, start, stop) for value in args]
                named = {name: _rows_of(value, rows, start, stop) for name, value in kwargs.items()}
                own = _through(acts, scope, tuple(given), named, own)
            pieces.append((start, own))
    made = in_order(pieces)
    return (made, *out[1:]) if isinstance(out, tuple) else made


def _through(
    acts: Sequence[Act], scope: Scope, args: tuple[Any, ...], kwargs: Mapping[str, Any], base: Tensor
) -> Tensor:
    """`base` (rows, ...), the base's own output for some rows, as one adapter's head changes it, or as several do by
    their weights."""
    if len(acts) > 1 and any(act.weight is None for act in acts):
        names = " and ".join(repr(act.adapter.name) for act in acts)
        raise UsageError(f"{names} each have their own {scope.site.path}: they cannot be chained", "Route one of them.")
    out = base
    for act in acts:
        scope.lay_out([act.adapter], base.dtype)
        params = act.part.at(scope.site.path, base.dtype, scope.cache)
        made = act.part.method.whole(params, act.part.sites[scope.site.path], args, kwargs)
        made = made[0] if isinstance(made, tuple) else made
        if made.shape[1:] != base.shape[1:]:
            raise UsageError(
                f"{act.adapter.name!r} has a head of {tuple(made.shape[1:])}, the base one of {tuple(base.shape[1:])}",
                "Run it on a base with as many labels.",
            )
        out = made if act.weight is None else out + act.weight * (made - base)
    return out


def _rows_of(value: Any, rows: int, start: int, stop: int) -> Any:
    return value[start:stop] if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows else value
