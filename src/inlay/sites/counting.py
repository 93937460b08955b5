"""How a backbone numbers positions where the caller gives none, seen in tiny forwards.

A first forward is given positions: whatever receives them, but for a constant (a table that keeps its first rows for
itself), is watched in those that are given none, with and without padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .tiny import plain_tokens

__all__ = ["Rule", "find_rule"]

LENGTH, PADDED = 5, 2
"""Tokens of a tiny row, and how many of them padding takes."""


@dataclass(frozen=True)
class Rule:
    """What positions count ("columns", "mask" or "ids"), the first token's, and the id that is not counted."""

    counts: str
    first: int
    padding: int | None = None


def find_rule(module: nn.Module, takes_mask: bool, paddings: Iterable[int]) -> Rule | None:
    """The rule that `module` follows, None where none of the three fits; `paddings` are ids that may be padding.

    Rows of the second forward: plain tokens; the same with the first ones masked (as without, where no mask is taken);
    and, for each id that may be padding, the same with that id in the place of the first ones.
    """
    tokens = plain_tokens(module, LENGTH)[::-1]  # not in the order of positions, so as not to be taken for them
    if len(tokens) <= PADDED:
        return None
    device = next(p.device for p in module.parameters())
    count = torch.arange(len(tokens))
    row = torch.tensor([tokens], device=device)
    given = _seen(module, input_ids=row, position_ids=(count + PADDED).to(device)[None])
    shifts = {where: seen[0] - count - PADDED for where, seen in given.items()}
    shifts = {where: int(shift[0]) for where, shift in shifts.items() if bool((shift == shift[0]).all())}

    fillers = list(dict.fromkeys(paddings))
    ids = row.repeat(2 + len(fillers), 1)
    for place, padding in enumerate(fillers, 2):
        ids[place, :PADDED] = padding
    inputs = {"input_ids": ids}
    if takes_mask:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][1, :PADDED] = 0
    rows = _seen(module, **inputs)
    found = next((rows[where] - shift for where, shift in shifts.items() if where in rows), None)
    return None if found is None else _judged(found, fillers)


def _judged(positions: Tensor, fillers: list[int]) -> Rule | None:
    """The rule by the positions (2 + fillers, length) of the rows that `find_rule` makes."""
    plain, masked, *filled = positions
    first, count = int(plain[0]), torch.arange(len(plain))
    if not torch.equal(plain, first + count):
        return None
    padded = first + count[:-PADDED]  # what real tokens behind padding get where they alone are counted
    if torch.equal(masked[PADDED:], padded):
        return Rule("mask", first)
    if not torch.equal(masked[PADDED:], plain[PADDED:]):
        return None
    for padding, behind in zip(fillers, filled, strict=True):
        if torch.equal(behind[PADDED:], padded):
            return Rule("ids", first, padding)
    return Rule("columns", first)


def _seen(module: nn.Module, **inputs: Any) -> dict[object, Tensor]:
    """What may be positions in one forward: the rows that tables look up, and arguments of that name, as (batch,
    length) each.

    Tables come first: what they look up is what counts.
    """
    tables: dict[object, Tensor] = {}
    named: dict[object, Tensor] = {}
    shape = inputs["input_ids"].shape

    def keep(into: dict[object, Tensor], key: object, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.ndim or value.is_floating_point() or value.shape[-1] < shape[1]:
            return
        rows = value[None] if value.ndim == 1 else value.reshape(-1, *value.shape[-2:])[0]
        if rows.shape[0] in (1, shape[0]):
            into.setdefault(key, rows[:, : shape[1]].expand(shape).cpu().clone())

    def entering(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(inner.forward).bind_partial(*args, **kwargs).arguments
        keep(named, inner, bound.get("position_ids"))

    handles = []
    try:
        for inner in module.modules():
            if inner is not module and "position_ids" in inspect.signature(inner.forward).parameters:
                handles.append(inner.register_forward_pre_hook(entering, with_kwargs=True))
        with _Lookups(lambda ids, weight: keep(tables, id(weight), ids)):
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {**tables, **named}


class _Lookups(TorchFunctionMode):
    """Shows each lookup in a table."""

    def __init__(self, show: Any) -> None:
        super().__init__()
        self.show = show

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding and len(args) > 1:
            self.show(args[0], args[1])
        return func(*args, **(kwargs or {}))
