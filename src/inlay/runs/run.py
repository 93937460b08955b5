"""A whole training run: base and data in, a folder with an adapter, its measures and its story out."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inlay
from inlay.bases.load import load_base
from inlay.errors import UsageError
from inlay.evaluation.score import metrics_of
from inlay.formats.carried import Carried, carried
from inlay.formats.folders import adapter_folder
from inlay.runtime.memory import Room, bound_kernels, parse_size, peak_memory_mb
from inlay.training.loop import enter
from inlay.training.plan import Plan

from .folder import RunFolder
from .libraries import check_libraries
from .material import Material, gather
from .resuming import check_same, start_of
from .settings import Settings, make_method, plan_of
from .trackers import Tracker
from .work import OnStep, Say, Work

__all__ = ["Settings", "make_method", "peak_memory_mb", "run"]

PATIENT = 2.0
"""Seconds after which people hear how far the rows are, and between two such words."""

OnProgress = Callable[[int, int], None]


def run(
    settings: Settings, on_step: OnStep | None = None, say: Say | None = None, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Train one adapter and return what `train --json` prints; the folder `settings.out` holds the rest.

    `say` (stderr where it is None) hears what people should know; `on_progress` how many rows are prepared, and of how
    many, after each few thousand (`say` hears of it now and then where it is None). Raises: UsageError, DataError or
    FormatError before any training where the settings, the data or the base are wrong, and then leaves no folder;
    InlayError where the disk is full; KeyboardInterrupt where the run was asked to stop, when everything that `resume`
    needs is on the disk.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    progress = on_progress or _Slow(say)
    folder = RunFolder(settings.out)
    start = start_of(settings, folder)
    if start.over:
        say(f"{folder.path} holds a finished run: there is nothing to go on with")
        return start.told.get("result") or {}
    source = None if settings.init_from is None else adapter_folder(settings.init_from)
    reading = carried([source]) if source is not None else None
    settings, given = _as_trained(settings, reading), settings
    plan = plan_of(settings, make_method(settings.method, settings.set)) if source is None else None
    check_libraries(settings)
    limit = parse_size(settings.memory_limit)
    material = gather(settings, reading.template if reading else None, progress)
    metric = _metric(settings, material)
    check_same(start, given, material, folder)
    bound_kernels()  # loading measures, and the first products of a process settle it
    base = load_base(settings.base, start.dtype(settings), settings.device, settings.quantize)
    bank = inlay.attach(base.model)
    plan = _plan(settings, plan, base.tokenizer, bank, source)
    for line in material.notices:  # once nothing can be wrong with the call any more
        say(line)
    room = Room(settings.tokens_at_once, limit, next(base.model.parameters()).device, told=say)
    work = Work(given, settings, material, base, bank, folder, metric, say, room, progress, plan)
    contender = enter(bank, [plan], len(work.prepared.examples), bank.adapters)[0]
    with folder.claimed(lambda: work.begun):
        tracker = Tracker(settings.track, folder.path / "track", dataclasses.asdict(given))
        try:
            return work.done(contender, tracker, on_step, start)
        finally:
            tracker.close()


def _as_trained(settings: Settings, reading: Carried | None) -> Settings:
    """Virtual tokens stand where the adapter that is gone on from had them, where nobody says another place."""
    if reading is None or settings.virtual_tokens_at != "start":
        return settings
    return dataclasses.replace(settings, virtual_tokens_at=reading.place)


def _plan(settings: Settings, plan: Plan | None, tokenizer: Any, bank: inlay.Bank, source: Path | None) -> Plan:
    """The plan with a method that knows the base; that of a saved adapter, which then is in the bank, where it begins.

    Raises: UsageError where the method finds nothing to act on; FormatError where the adapter is of another base.
    """
    if source is not None:
        return plan_of(settings, bank.load("adapter", source).method)
    assert plan is not None
    plan = dataclasses.replace(plan, method=plan.method.prepared(tokenizer))
    plan.method.check_fit(plan.method.sites(bank.base))
    return plan


def _metric(settings: Settings, material: Material) -> str:
    there = metrics_of(material.template.kind)
    if settings.metric is not None and settings.metric not in there:
        raise UsageError(
            f"{material.template.kind} rows have no metric {settings.metric!r}", f"Use {', '.join(there)}."
        )
    if settings.patience is not None and not len(material.choosing):
        raise UsageError("patience needs held-out rows to choose by", "Hold out a share of the rows, or name a file.")
    return settings.metric or there[0]


class _Slow:
    """Says now and then how many rows are ready, if that takes long."""

    def __init__(self, say: Say) -> None:
        self._say, self._next = say, time.monotonic() + PATIENT

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() > self._next:
            self._next = time.monotonic() + PATIENT
            self._say(f"preparing rows: {done:,} of {total:,}")
