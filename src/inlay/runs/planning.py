"""Plans that are made once base and rows are known, and those that a run's record holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.bank.bank import Bank
from inlay.bases.load import Base
from inlay.runtime.memory import TokenBudget
from inlay.training.plan import Plan
from inlay.values import fields_of

from .context import OnMessage
from .dataset import Dataset
from .settings import Settings, make_method

__all__ = ["Opened", "Planner", "recorded_plans"]


@dataclass(frozen=True)
class Opened:
    """What a planner sees: the rows, the base with its bank (no adapter in it yet), and what a forward may take."""

    settings: Settings
    dataset: Dataset
    base: Base
    bank: Bank
    budget: TokenBudget
    on_message: OnMessage


Planner = Callable[[Opened], Sequence[Plan]]
"""Makes the plans of a new run; a run that is resumed has those of its record. It leaves the bank as it was.
Raises: UsageError where there is nothing to train."""


def recorded_plans(record: Mapping[str, Any]) -> list[Plan]:
    """The plans that run.json holds; none where it holds none. Raises: UsageError where one cannot be made again."""
    place = (record.get("config") or {}).get("virtual_tokens_at")
    return [_plan(values, place) for values in (record.get("plans") or {}).values()]


def _plan(values: Mapping[str, Any], place: str | None) -> Plan:
    """`place` is where virtual tokens stood in records of a time when that was the same for all."""
    method = make_method(values["method"], {})
    known = {field.name for field in fields_of(type(method))}
    made = dataclasses.replace(method, **{name: value for name, value in values["set"].items() if name in known})
    course = {f.name: values[f.name] for f in dataclasses.fields(Plan) if f.name in values}
    course.setdefault("virtual_tokens_at", place if made.virtual_length else None)
    return Plan(**{**course, "method": made})
