"""Refuses a field of an adapter_config.json that means something which is not read; see `inlay.methods.peft_fields`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from inlay.errors import FormatError, UsageError
from inlay.methods.contract import Method
from inlay.methods.peft_fields import COMMON

__all__ = ["check_fields", "with_task"]

NOTHING = (None, [], {})
"""What an unknown field may be set to: no release gives a meaning to those."""


SAVED = "modules_to_save"
TASKS, TASK = "num_tasks", "task"
"""How many tasks share a prompt; and which of them is meant, a field of ours, which no file of HF PEFT has."""


def with_task(config: dict[str, Any], task: int | None, where: str) -> dict[str, Any]:
    """`config`, saying which task is meant where a caller says it. Raises: UsageError where it has no tasks."""
    if task is None:
        return config
    if TASKS not in config:
        raise UsageError(f"{where} holds no prompt that several tasks share", "Leave task out.")
    return {**config, TASK: task}


def check_fields(config: Mapping[str, Any], kind: type[Method], where: str) -> None:
    """Raises: FormatError naming a field of `config` that is unknown, or refused and not at its default."""
    for name, value in config.items():
        if why := _refusal(name, value, kind):
            what = f"adapter_config.json of {where} sets {name} to {_short(value)}, {why}"
            raise FormatError(what, "Load it with HF PEFT.")


def _refusal(name: str, value: Any, kind: type[Method]) -> str | None:
    fields = kind.peft_fields
    if name in COMMON.read or name in COMMON.passed:
        return None
    if fields is None:  # a type of Inlay's own
        own = {f.name for f in dataclasses.fields(kind)} | {"target_modules", SAVED}
        return None if name in own else "which no method here has"
    limited = {**fields.refused, **fields.older}
    if name == TASK and TASKS in fields.read:
        return None
    if name == SAVED and name not in limited:  # a head goes with any method, also where HF PEFT has no field for it
        return None
    if name in limited:
        return None if value == limited[name] or value in NOTHING else "which is not supported"
    return None if name in fields.read or name in fields.passed or value in NOTHING else "which Inlay does not know"


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
