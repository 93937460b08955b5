"""Where adapters are loaded: those that write text beside the base that is served, and those that were trained with a
head beside the same base with such a head, over the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from inlay.bank.bank import Bank, attach
from inlay.bases.heads import HEADED, Head, can_write
from inlay.errors import UsageError
from inlay.formats.peft import CONFIG

from .entries import Entry, head_in_files, task_in_files
from .folders import Folders
from .versions import Loaded, Versions

__all__ = ["Homes", "Opens", "check_brings", "head_missing"]

TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag"}
"""What HF PEFT calls such tasks."""

Opens = Callable[[Head], tuple[Any, Sequence[str]]]
"""Makes of the base that is served one with a head, and says which of its modules hold nothing yet. Raises:
UsageError."""


class Homes:
    """The versions of adapters by what their base gives. `opens` makes bases with heads, one for each task and number
    of outputs; without it none is made. All methods are for the thread that owns the bank."""

    def __init__(self, bank: Bank, folders: Folders, memory: int | None, opens: Opens | None) -> None:
        self._numbers = count(1)
        self.writing, self.memory = Versions(bank, folders, self._numbers), memory
        self._folders, self._opens = folders, opens
        self._headed: dict[tuple[str, int], Versions] = {}

    def of(self, entry: Entry) -> Versions:
        """Where what an adapter's files hold belongs. Raises: InlayError where its base cannot be made, or its notes
        are broken."""
        head = head_in_files(entry)
        if head is None or self._opens is None:
            return self.writing
        shape = head.task, len(head.labels)
        if shape not in self._headed:
            model, empty = self._opens(head)
            made = self._headed[shape] = Versions(attach(model), self._folders, self._numbers)
            made.verify = lambda name: check_brings(made.bank, name, empty)
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
    """Why an adapter does not load beside the base `model`, which lacks its head, or writes no text; None where that is
    not so."""
    base, task = type(model).__name__, task_in_files(entry) or _by_config(entry)
    if task is None or base.endswith(HEADED):
        what = f"adapter {entry.name!r} notes no head, and the base that is served, {base}, writes no text"
        return None if can_write(model) else UsageError(what, "Train it here, with --task classify.")
    words = ", or train it on words for its labels (--task generate): /v1/classify serves those"
    return UsageError(
        f"adapter {entry.name!r} was trained to {task} with a head, and the base that is served, {base}, has none",
        f"Ask it with `inlay predict`{words if task == 'classify' and can_write(model) else ''}.",
    )


def check_brings(bank: Bank, name: str, empty: Sequence[str]) -> None:
    """Raises: UsageError where an adapter has no copy of its own of a module that is `empty` in the base."""
    own = {path for part in bank.adapters[name].parts if part.method.replaces for path in part.sites}
    for path in empty:
        if not any(path == one or path.startswith(f"{one}.") for one in own):
            what = f"adapter {name!r} has no {path} of its own, and the base that is served has none either"
            raise UsageError(what, "Ask it with `inlay predict`.")


def _by_config(entry: Entry) -> str | None:
    """What an adapter of HF PEFT says that it does with a head of its own."""
    try:
        config = json.loads((entry.path / CONFIG).read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(config, dict) and bool(config.get("modules_to_save"))
    return TASKS.get(str(config.get("task_type"))) if known else None
