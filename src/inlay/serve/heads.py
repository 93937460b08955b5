"""Where adapters are loaded: those that write text beside the base that is served, and those that were trained with a
head beside the same base with such a head, over the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from inlay.bank.bank import Bank, attach
from inlay.bases.heads import HEADED, Head
from inlay.errors import UsageError
from inlay.formats.peft import CONFIG

from .entries import Entry, head_of, head_task
from .folders import Folders
from .versions import Loaded, Versions

__all__ = ["Homes", "Opens", "head_missing"]

TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag"}
"""What HF PEFT calls such tasks."""

Opens = Callable[[Head], Any]
"""Makes of the base that is served one with a head. Raises: UsageError."""


class Homes:
    """The versions of adapters by what their base gives. `opens` makes bases with heads, one for each task and number
    of outputs; without it none is made. All methods are for the thread that owns the bank."""

    def __init__(self, bank: Bank, folders: Folders, memory: int | None, opens: Opens | None) -> None:
        self.writing, self.memory = Versions(bank, folders), memory
        self._folders, self._opens = folders, opens
        self._headed: dict[tuple[str, int], Versions] = {}

    def of(self, entry: Entry) -> Versions:
        """Where an adapter belongs. Raises: UsageError where its base cannot be made."""
        head = head_of(entry)
        if head is None or self._opens is None:
            return self.writing
        shape = head.task, len(head.labels)
        if shape not in self._headed:
            self._headed[shape] = Versions(attach(self._opens(head)), self._folders)
        return self._headed[shape]

    def __iter__(self) -> Iterator[Versions]:
        yield self.writing
        yield from self._headed.values()

    def holding(self, loaded: Loaded) -> Versions:
        """Where a version was loaded."""
        return next(versions for versions in self if versions.bank is loaded.bank)

    def sweep(self) -> None:
        """Take what was let go, and is in no row, out of the banks."""
        for versions in self:
            versions.sweep()

    @property
    def too_large(self) -> bool:
        return self.memory is not None and sum(versions.bytes for versions in self) > self.memory


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
