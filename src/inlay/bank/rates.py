"""Learning rates that a method gives to some of its parameters, in the optimizers of other people's loops."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .adapter import Adapter

__all__ = ["groups_of", "rates_act", "warn_of_rates"]


def groups_of(adapter: Adapter, lr: float, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The adapter's tensors as groups for a torch optimizer, by rate."""
    adapter.grouped = True
    return [{"params": [*own.values()], "lr": lr * rate, **settings} for rate, own in adapter.by_rate().items()]


def warn_of_rates(adapter: Adapter) -> None:
    """Say, once, that an optimizer over a plain list of this adapter's tensors would give all of them one rate."""
    rates = {} if adapter.grouped else adapter.by_rate()
    adapter.grouped = True
    if len(rates) < 2:
        return
    warnings.warn(
        f"adapter {adapter.name!r} wants {', '.join(f'{rate:g}' for rate in rates)} times the learning rate for "
        "different tensors (LoRA+): an optimizer over bank.parameters has one for all. "
        "Give it bank.parameter_groups(lr).",
        stacklevel=3,
    )


def rates_act(adapter: Adapter, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the groups of an optimizer have rates in the proportions that the adapter's methods say."""
    lr = {id(p): float(group.get("initial_lr", group["lr"])) for group in groups for p in group["params"]}
    found = {rate: {lr.get(id(p), 0.0) / rate for p in own.values()} for rate, own in adapter.by_rate().items()}
    units = [unit for own in found.values() for unit in own]
    return max(units, default=0.0) - min(units, default=0.0) <= 1e-6 * max(units, default=0.0)
