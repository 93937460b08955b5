"""A whole training run: base and data in, a folder with adapters and a record of the run out."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inlay.bank.bank import Bank, attach
from inlay.bases.adapters import adapter_folder
from inlay.bases.load import Base, load_base
from inlay.data.prompting import Prompting, prompting_of
from inlay.errors import InlayError, UsageError
from inlay.evaluation.score import metrics_of
from inlay.files import finite, write_json
from inlay.runtime.memory import TokenBudget, bound_kernels, peak_memory_mb
from inlay.runtime.tasks import HeadTask, task_of
from inlay.sites.parameters import experts_left_out
from inlay.training.gradients import Shares
from inlay.training.plan import Plan

from .context import Context, OnMessage
from .dataset import Dataset, load_dataset
from .estimate import estimate_mb
from .finish import Measure, finish
from .folder import RunFolder
from .libraries import check_libraries
from .planning import Opened, Planner, recorded_plans
from .predicting import course_seconds
from .processes import memory_limit, own_device
from .progress import Due
from .record import Record
from .resuming import Start, check_same, start_of
from .session import OnStep, Session
from .settings import Settings, make_method, plan_of
from .tasking import head_of, task_notices, with_task
from .together import together
from .trackers import Tracker
from .turns import Select

__all__ = ["Settings", "make_method", "peak_memory_mb", "run"]

NAME = "adapter"
"""Of the learner in a run of one."""
MANY = 16
"""Methods that are made room for where the plans come later."""
PATIENT = 2.0
"""Seconds after which the progress of preparing rows is reported, and between two reports."""

OnProgress = Callable[[int, int], None]


def run(
    settings: Settings, on_step: OnStep | None = None, on_message: OnMessage | None = None,
    on_progress: OnProgress | None = None, plans: Sequence[Plan] | Planner | None = None,
    select: Select | None = None, due: Due | None = None, measure: Measure | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train one adapter, or one for each of `plans`, and return what `train --json` prints; the rest is in the folder
    `settings.out` (`RunFolder`).

    `plans` train together on the same rows in place of the settings' method and course; a planner makes them when base
    and rows are there. `select` says which of them stop and start between steps, `due` after which step one is scored
    (where it is None, the settings do), and `measure` sees them when all else is done. `on_step` sees each learner
    after each of its steps, `on_message` (stderr where it is None) gets lines for people, `on_progress` the rows that
    are ready and of how many (`on_message` now and then where it is None). In the processes that torchrun has started,
    the first one is the run and the others take shares of its steps; all return the same.

    Raises: UsageError, DataError or FormatError before any training where settings, data or base are wrong, and then
    leaves no folder; InlayError where the disk is full, or another process has failed; KeyboardInterrupt where the run
    was asked to stop, when everything that `resume` needs is on the disk.
    """
    on_message = on_message or (lambda line: print(line, file=sys.stderr, flush=True))
    told = on_message, on_progress or _Slow(on_message)
    return together(lambda shares: _run(settings, plans, select, due, measure, on_step, *told, shares))


def _run(
    settings: Settings, plans: Sequence[Plan] | Planner | None, select: Select | None, due: Due | None,
    measure: Measure | None, on_step: OnStep | None, on_message: OnMessage, on_progress: OnProgress, shares: Shares,
) -> dict[str, Any]:  # fmt: skip
    """The run, in its first process."""
    folder = RunFolder(settings.out)
    start = start_of(settings, None if callable(plans) else plans, folder)
    if start.over:
        on_message(f"{folder.path} holds a finished run: there is nothing to go on with")
        return start.record.get("result") or {}
    context = _context(settings, plans, folder, start, on_message, on_progress, shares)
    session: Session | None = None
    with folder.claimed(lambda: session is not None and session.begun):
        tracker = Tracker(settings.track, folder.path / "track", dataclasses.asdict(settings))
        try:
            session = Session(context, tracker, select, due)
            return _trained(context, session, start, on_step, measure)
        finally:
            tracker.close()


def _context(
    given: Settings, plans: Sequence[Plan] | Planner | None, folder: RunFolder, start: Start,
    on_message: OnMessage, on_progress: OnProgress, shares: Shares,
) -> Context:  # fmt: skip
    """Check all that needs no base, then load data and base."""
    source = None if given.init_from is None else adapter_folder(given.init_from)
    prompting = prompting_of([source]) if source is not None else None
    settings, why = with_task(_as_trained(given, prompting), prompting)
    planner = plans if callable(plans) and not start.record else None
    listed = (None if planner else recorded_plans(start.record)) if callable(plans) else plans
    folder.several = planner is not None or (listed is not None and len(listed) > 1)
    plans = [] if planner else _plans(settings, listed, source)
    check_libraries(settings, [plan.optimizer for plan in plans] or [settings.optimizer])
    limit = memory_limit(settings.memory_limit)
    dataset = load_dataset(settings, prompting.template if prompting else None, on_progress)
    metric = _metric(settings, dataset)
    check_same(start, given, listed, dataset, folder)
    bound_kernels(MANY if planner else len({repr(plan.method) for plan in plans}) or 1)  # before the first products
    head = head_of(dataset.template)
    base = load_base(settings.base, start.dtype(settings), own_device(settings.device), settings.quantize, head)
    bank = attach(base.model)
    budget = TokenBudget(settings.tokens_at_once, limit, base.model.device, on_message=on_message)
    if planner is not None:
        listed = planner(Opened(settings, dataset, base, bank, budget, on_message))
        plans = _plans(settings, listed, None)
    plans = _for_base(settings, plans, source, base, bank)
    shares.open(_opening(settings, dataset, base, bank, source, len({repr(plan.method) for plan in plans})))
    notices = (*why, *dataset.notices, *task_notices(base, dataset), *_left_out(plans, bank))
    dataset = dataclasses.replace(dataset, notices=notices)
    for line in dataset.notices:  # once nothing can be wrong with the call any more
        on_message(line)
    return Context(
        given, settings, plans, dataset, base, bank, folder, metric, budget, on_message, on_progress, listed or (),
        shares,
    )  # fmt: skip


def _opening(
    settings: Settings, dataset: Dataset, base: Base, bank: Bank, source: Path | None, methods: int
) -> dict[str, Any]:
    """What other processes must know to open the same base, in words (`Worker`)."""
    head, task = head_of(dataset.template), task_of(dataset.template, bank, base.fresh)
    return {
        "base": settings.base,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": settings.device,
        "quantize": settings.quantize,
        "head": None if head is None else [head.task, head.labels],
        "task": [task.name, task.saved] if isinstance(task, HeadTask) else None,
        "fingerprint": bank.fingerprint,
        "adapters": {} if source is None else {NAME: str(source)},
        "memory_limit": settings.memory_limit,
        "methods": methods,
    }


def _left_out(plans: Sequence[Plan], bank: Bank) -> list[str]:
    """What the methods leave alone of a base whose experts are parameters, each line once."""
    parts: list[Any] = [part for plan in plans for part in plan.method.parts() if hasattr(part, "targets")]
    found = (experts_left_out(bank.base, part.targets, part.sites(bank.base)) for part in parts)
    return list(dict.fromkeys(line for line in found if line is not None))


def _for_base(settings: Settings, plans: list[Plan], source: Path | None, base: Base, bank: Bank) -> list[Plan]:
    """The plans with methods that know the base; that of a saved adapter, which then is in the bank, where it begins.

    Raises: UsageError where a method finds nothing to act on; FormatError where the adapter is of another base.
    """
    if source is not None:
        return [plan_of(settings, bank.load(NAME, source).method, NAME)]
    plans = [dataclasses.replace(plan, method=plan.method.with_tokenizer(base.tokenizer)) for plan in plans]
    for plan in plans:
        plan.method.check_fit(plan.method.sites(bank.base))
    return plans


def _plans(settings: Settings, plans: Sequence[Plan] | None, source: Path | None) -> list[Plan]:
    """The plans that are given, or the settings' one; none yet where an adapter in `source` will make it.

    Raises: UsageError.
    """
    if plans is None:
        method = None if source is not None else make_method(settings.method, settings.set)
        return [] if method is None else [plan_of(settings, method, NAME)]
    if source is not None:
        raise UsageError("--from makes a plan, and plans are given", "Leave one of them out.")
    names = [plan.name for plan in plans]
    for name in names:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UsageError(f"{name!r} cannot name a folder", "Use letters, digits, and . _ + - inside.")
        if names.count(name) > 1:
            raise UsageError(f"two learners are called {name!r}", "Give each a name of its own.")
    if not plans:
        raise UsageError("there is no learner", "Give one plan at least.")
    return list(plans)


def _trained(
    context: Context, session: Session, start: Start, on_step: OnStep | None, measure: Measure | None
) -> dict[str, Any]:
    """Train to the end and finish. Raises: as `run`."""
    folder = context.folder
    if not (context.settings.resume and session.resume(start.extends)):
        if start.extends:
            raise UsageError(f"{folder.path} holds no checkpoint to go on from", "Train into another folder.")
        if context.settings.resume:
            context.on_message(f"{folder.path} holds no whole checkpoint: starting afresh")
        session.start()
    bank, examples, processes = context.bank, context.prepared.examples, context.shares.size
    scored = bool(len(context.choosing))
    recompute = context.settings.gradient_checkpointing
    estimate = estimate_mb(bank, session.learners, examples, context.budget, context.task, processes, scored, recompute)
    _check_limit(context.budget, estimate["least_mb"])
    each = f" in each of the {processes} processes" if processes > 1 else ""
    context.on_message(f"about {estimate['estimate_mb']:,.0f} MB of memory will be needed{each}")
    record = Record(context, session, estimate, _seconds(context, session, start))
    with folder.must_write("nothing is trained yet"):
        write_json(folder.record, finite(record.run_record("running")))
    session.train(on_step)
    files = session.checkpoints.files()
    with folder.must_write(f"the checkpoint {files[-1].name} is kept" if files else "no checkpoint could be kept"):
        if not session.interrupted:
            return finish(context, session, record, measure)
        for name, own in session.progress.items():
            with own.learner.averaged_weights():
                context.save(name, folder.last(name))
        write_json(folder.record, finite(record.run_record("interrupted")))
    raise KeyboardInterrupt(f"stopped after step {session.step}; --resume goes on from there")


def _seconds(context: Context, session: Session, start: Start) -> float | None:
    """How long the run will take, as far as that is known before its first step; said to people."""
    if session.step or context.several or context.shares.size > 1:
        return None if start.extends else (start.record.get("predicted") or {}).get("seconds")
    bank, examples, (learner,) = context.bank, context.prepared.examples, session.learners
    recompute = context.settings.gradient_checkpointing
    found = course_seconds(bank, learner, examples, context.budget, context.task, recompute)
    if found is None:
        return None
    context.on_message(f"about {found:,.0f} s of training, scoring left out")
    return found + session.seconds


def _check_limit(budget: TokenBudget, least_mb: float) -> None:
    if budget.limit_mb is not None and least_mb > budget.limit_mb:
        raise InlayError(
            f"the base and one row take about {least_mb:.0f} MB, the limit is {budget.limit_mb:.0f} MB",
            "Use --dtype bfloat16, a lower --max-length, or a higher --memory-limit.",
        )


def _as_trained(settings: Settings, prompting: Prompting | None) -> Settings:
    """With the virtual tokens where the adapter of --from had them, unless the settings name another place."""
    if prompting is None or settings.virtual_tokens_at != "start":
        return settings
    return dataclasses.replace(settings, virtual_tokens_at=prompting.virtual_at)


def _metric(settings: Settings, dataset: Dataset) -> str:
    there = metrics_of(dataset.template.kind)
    if settings.metric is not None and settings.metric not in there:
        raise UsageError(f"{dataset.template.kind} rows have no metric {settings.metric!r}", f"Use {', '.join(there)}.")
    if settings.patience is not None and not len(dataset.choosing):
        raise UsageError("patience needs held-out rows to choose by", "Hold out a share of the rows, or name a file.")
    return settings.metric or there[0]


class _Slow:
    """Reports now and then how many rows are ready, if that takes long."""

    def __init__(self, on_message: OnMessage) -> None:
        self._on_message, self._next = on_message, time.monotonic() + PATIENT

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() > self._next:
            self._next = time.monotonic() + PATIENT
            self._on_message(f"preparing rows: {done:,} of {total:,}")
