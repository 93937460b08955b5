"""Resuming a run, or extending it: the settings that must be as they were, and those that may be more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from inlay.errors import UsageError
from inlay.training.plan import Plan

from .dataset import Dataset
from .folder import RunFolder
from .settings import Settings, differences, plan_record

__all__ = ["Start", "check_same", "start_of"]

COMPARED = ("digest", "heldout_digest", "rows", "heldout_rows")
"""Of the data, what must not have changed."""
LENGTHS = ("steps", "epochs")


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run starts: `record` is the folder's run.json where that run is resumed, else empty.

    `extends` a finished run beyond its end; where it is `over` there is nothing to do.
    """

    record: dict[str, Any]
    extends: bool = False
    over: bool = False

    def dtype(self, settings: Settings) -> str:
        """The base's dtype: the resumed run's, where the settings leave it open."""
        return str(self.record.get("dtype") or "auto") if settings.dtype == "auto" else settings.dtype


def start_of(settings: Settings, plans: Sequence[Plan] | None, folder: RunFolder) -> Start:
    """How `settings` start in `folder`. Raises: UsageError where it holds a run and they do not say --resume."""
    folder.check(settings.resume)
    if not settings.resume or not folder.record.exists():
        return Start({})
    record = folder.read()
    if not folder.finished or any(folder.requests.glob("*.json")):
        return Start(record)
    more = not str(record.get("status")).startswith("diverged") and _asks_for_more(settings, plans, record)
    return Start(record, extends=more, over=not more)


def _asks_for_more(settings: Settings, plans: Sequence[Plan] | None, record: dict[str, Any]) -> bool:
    """Whether the settings, or one of `plans`, have more steps or epochs than the finished run."""
    if plans is None or "plans" not in record:
        return _longer(dataclasses.asdict(settings), record.get("config") or {}, record.get("total_steps"))
    before, parts = record["plans"], record.get("learners") or {}
    return any(
        _longer(plan_record(plan), before[plan.name], parts.get(plan.name, record).get("total_steps"))
        for plan in plans
        if plan.name in before
    )


def _longer(now: Mapping[str, Any], before: Mapping[str, Any], total: int | None) -> bool:
    if now["steps"] is not None:
        return now["steps"] > (total or before.get("steps") or 0)
    return before.get("steps") is None and now["epochs"] > before.get("epochs", now["epochs"])


def check_same(
    start: Start, settings: Settings, plans: Sequence[Plan] | None, dataset: Dataset, folder: RunFolder
) -> None:
    """Raises: UsageError showing what differs from the run that is to be resumed."""
    if not start.record:
        return
    free = LENGTHS if start.extends else ()
    before, now = (
        {name: value for name, value in config.items() if name not in free}
        for config in (start.record.get("config") or {}, dataclasses.asdict(settings))
    )
    changed = [*differences(before, now), *_changed_plans(start, plans, free)]
    data, summary = start.record.get("data") or {}, dataset.summary()
    changed += [f"data {n} was {data.get(n)}, is {summary.get(n)}" for n in COMPARED if data.get(n) != summary.get(n)]
    if changed:
        raise UsageError(
            f"{folder.path} was begun otherwise: {'; '.join(changed)}", "Give what was given, or another --out."
        )


def _changed_plans(start: Start, plans: Sequence[Plan] | None, free: Sequence[str]) -> list[str]:
    """The learners whose plans differ, for people; `free` names settings that may."""
    before = start.record.get("plans") or {}
    now = {} if plans is None else {plan.name: plan_record(plan) for plan in plans}
    found = []
    for name in {**before, **now}:
        if name not in now or name not in before:
            found.append(f"the learner {name} {'is gone' if name in before else 'is new'}")
            continue
        old, new = before[name], now[name]
        old = {"virtual_tokens_at": new.get("virtual_tokens_at"), **old}  # once that was the same for all
        differ = [key for key in {**old, **new} if key not in free and old.get(key) != new.get(key)]
        found += [f"{name}: {key} was {old.get(key)!r}, is {new.get(key)!r}" for key in differ]
    return found
