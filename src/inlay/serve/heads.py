"""Adapters that were trained with a head, beside a base that has none."""

from __future__ import annotations

import json
from typing import Any

from inlay.errors import UsageError
from inlay.formats.peft import CONFIG

from .entries import Entry, head_task

__all__ = ["head_missing"]

HEADED = ("ForSequenceClassification", "ForTokenClassification")
"""How classes of bases end that have a head."""
TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag"}
"""What HF PEFT calls such tasks."""


def head_missing(entry: Entry, model: Any) -> UsageError | None:
    """Why an adapter with a head does not load beside the base `model`; None where it has none, or the base has one."""
    base, task = type(model).__name__, head_task(entry) or _by_config(entry)
    if task is None or base.endswith(HEADED):
        return None
    words = ", or train it on words for its labels (--task generate): /v1/classify serves those"
    return UsageError(
        f"adapter {entry.name!r} was trained to {task} with a head, and the base that is served, {base}, has none",
        f"Ask it with `inlay predict`{words if task == 'classify' else ''}.",
    )


def _by_config(entry: Entry) -> str | None:
    """What an adapter of HF PEFT says that it does with a head of its own."""
    try:
        config = json.loads((entry.path / CONFIG).read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(config, dict) and bool(config.get("modules_to_save"))
    return TASKS.get(str(config.get("task_type"))) if known else None
