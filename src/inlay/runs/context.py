"""What the parts of a run share: settings and plans, rows as tokens, the base with its bank, the folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from inlay.bank.bank import Bank
from inlay.bases.load import Base
from inlay.data.prepare import prepare
from inlay.data.table import Rows
from inlay.data.targets import HeadEncoder, encoder_of, prepare_targets
from inlay.evaluation.score import Items, NoneLeft, items_of
from inlay.runtime.forward import check_reads
from inlay.runtime.memory import TokenBudget
from inlay.runtime.tasks import GENERATE, task_of
from inlay.sites.positions import table_size
from inlay.training.gradients import ALONE, Shares
from inlay.training.plan import Plan

from .dataset import Dataset
from .fitting import fit_of
from .folder import RunFolder
from .settings import Settings, plan_record
from .tasking import number_notice

__all__ = ["Context", "OnMessage"]

OnMessage = Callable[[str], None]


class Context:
    """`given` are the settings as people gave them; `plans` are those of all learners the run may have.

    `listed` are those that the caller named, empty where the settings make the one plan.
    All learners read the same `prepared` rows, cut to the fewest positions that any of their methods leaves. `choosing`
    and `final` are the held-out rows. run.json keeps the `notices`. `begun` is the time before the rows were prepared.
    `shares` spreads each step over processes.
    """

    def __init__(
        self, given: Settings, settings: Settings, plans: Sequence[Plan], dataset: Dataset, base: Base, bank: Bank,
        folder: RunFolder, metric: str, budget: TokenBudget, on_message: OnMessage,
        on_progress: Callable[[int, int], None], listed: Sequence[Plan] = (), shares: Shares = ALONE,
    ) -> None:  # fmt: skip
        self.begun = time.perf_counter()
        self.given, self.settings, self.dataset, self.base, self.bank = given, settings, dataset, base, bank
        self.plans = {plan.name: plan for plan in plans}
        self.listed = {plan.name: plan_record(plan) for plan in listed}
        self.folder, self.metric, self.budget, self.on_message = folder, metric, budget, on_message
        self.shares = shares
        self.task = task_of(dataset.template, bank, base.fresh)
        self.task.check(bank)
        if self.task is GENERATE:
            check_reads(bank, dataset.template.kind)
        fits = [fit_of(base.model, plan.method, settings.max_length) for plan in plans]
        fit = min(fits, key=lambda one: one.max_length)
        self.max_length, self.limit = fit.max_length, fit.limit
        self.encoder = encoder_of(dataset.template)(
            base.tokenizer, dataset.template, settings.max_length, settings.virtual_tokens_at, fit.limit,
            table_size(base.model),
        )  # fmt: skip
        self.notices = list(dataset.notices)
        if isinstance(self.encoder, HeadEncoder):
            self.prepared = prepare_targets(self.encoder, dataset.rows, on_progress)
        else:
            self.prepared = prepare(self.encoder, dataset.rows, on_progress)
        if self.task.name == "regress" and (line := number_notice(self.prepared.examples)):
            self.notice(line)
        self.choosing, self.final = self._items(dataset.choosing), self._items(dataset.final)
        self.lengths = self.prepared.examples.lengths
        if line := fit.notice(self.prepared.counts, settings.base):
            self.notice(line)

    @property
    def compared(self) -> list[str | None]:
        """The base, where it can do the task: a head that was drawn at random says nothing."""
        return [] if self.base.fresh else [None]

    def add(self, plan: Plan) -> None:
        """Let a plan be one of those that the run may have."""
        fit_of(self.base.model, plan.method, self.settings.max_length)
        self.plans[plan.name] = replace(plan, method=plan.method.with_tokenizer(self.base.tokenizer))
        self.listed[plan.name] = plan_record(plan)

    @property
    def several(self) -> bool:
        """Whether the run has several learners, so that lines and files must name theirs."""
        return len(self.plans) > 1

    @property
    def dtype(self) -> str:
        """The base's dtype, as --dtype names it."""
        return str(self.base.dtype).removeprefix("torch.")

    def notice(self, line: str, name: str | None = None) -> None:
        """Say a line, of the learner `name` if it is one's own, and keep it for run.json."""
        line = self.named(line, name)
        self.on_message(line)
        self.notices.append(line)

    def named(self, line: str, name: str | None) -> str:
        """`line` with the learner's name in front, where the run has several."""
        return f"{name}: {line}" if self.several and name is not None else line

    def save(self, name: str, path: Path) -> None:
        """Write the adapter `name` as it is to a folder, with the template and length that it was trained with."""
        notes = {"template": self.encoder.template.to_dict(), "max_length": self.max_length, "base": self.settings.base}
        notes |= {"virtual_tokens_at": self.settings.virtual_tokens_at, "dtype": self.dtype}
        self.bank.save(name, path, notes=notes)

    def _items(self, rows: Rows) -> Items:
        """Held-out rows, encoded once. Where none is of use, the run goes on without."""
        try:
            return items_of(self.encoder, rows)
        except NoneLeft as error:
            self.notice(f"held-out rows: {error.what}")
            return Items((), (), Counter(rows=len(rows)))
