"""The start of an adapter, made again from what its run noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inlay.bank.adapter import Adapter
from inlay.bank.bank import Bank
from inlay.errors import InlayError, UsageError
from inlay.runs.settings import make_method

__all__ = ["start_again"]


def start_again(bank: Bank, folder: Path, tokenizer: Any) -> Adapter:
    """The adapter in `folder` as it was before its first step; it is no part of the bank.

    Raises: UsageError where that is not known: there is no run.json above, or the run went on from another adapter, or
    began from rows.
    """
    method, settings, seed = _noted(folder)
    made = make_method(method, settings).with_tokenizer(tokenizer)
    parts = [part for one in [made] for part in one.parts()]
    if any(part.start_rows or part.uses for part in parts):
        raise UsageError("its start came from rows or other adapters", "Look at where it ended.")
    with bank.alone():
        return Adapter.fresh("start", parts, bank.base, seed)


def _noted(folder: Path) -> tuple[str, dict[str, Any], int]:
    """The method's name, its settings and the seed that the run of an adapter noted. Raises: UsageError."""
    for run in (folder.parent, folder.parent.parent):
        record = _read(run / "run.json")
        if not record:
            continue
        config, plans = record.get("config") or {}, record.get("plans")
        own = config if not isinstance(plans, dict) else plans.get(_learner(run, folder))
        if not isinstance(own, dict) or not isinstance(own.get("method"), str):
            break
        if config.get("init_from"):
            raise UsageError("its run went on from another adapter", "Look at where it ended.")
        settings = own.get("set")
        return own["method"], settings if isinstance(settings, dict) else {}, int(own.get("seed") or 0)
    raise UsageError("no run.json beside it says how it began", "Name the adapter in its run's folder.")


def _learner(run: Path, folder: Path) -> str:
    """The name of the learner whose adapter is in `folder`: the folder's own, or that of the race's winner."""
    return folder.name if folder.parent != run else str(_read(run / "race.json").get("winner"))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def started(bank: Bank, folder: Path, tokenizer: Any) -> tuple[Adapter | None, str]:
    """The start, or why it is not known, in words."""
    try:
        return start_again(bank, folder, tokenizer), ""
    except InlayError as error:
        return None, error.what
