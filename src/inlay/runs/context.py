"""What the parts of a run share: settings and plans, rows as tokens, the base with its bank, the folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from inlay.bank.bank import Bank
from inlay.bases.load import Base
from inlay.data.collisions import LOOKED_AT, collisions
from inlay.data.encode import Encoder
from inlay.data.prepare import Examples
from inlay.data.targets import encoder_of
from inlay.runtime.forward import check_reads
from inlay.runtime.memory import TokenBudget
from inlay.runtime.tasks import GENERATE, task_of
from inlay.sites.positions import table_size
from inlay.training.gradients import ALONE, Shares
from inlay.training.plan import Plan

from .dataset import Dataset
from .encoded import EncodedRows, encoded_rows
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
    and `final` are the held-out rows. All three have virtual tokens where the settings say; `rows_of` has them where a
    learner's plan does. run.json keeps the `notices`. `begun` is the time before the rows were prepared. `shares`
    spreads each step over processes.
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
        self.notices = list(dataset.notices)
        usual = encoded_rows(self._encoder(settings.virtual_tokens_at), dataset, on_progress, self.notice)
        self._rows = {settings.virtual_tokens_at: usual}
        self.encoder, self.prepared = usual.encoder, usual.prepared
        self.choosing, self.final = usual.choosing, usual.final
        if self.task.name == "regress" and (line := number_notice(self.prepared.examples)):
            self.notice(line)
        self.lengths = self.prepared.examples.lengths
        if line := fit.notice(self.prepared.counts, settings.base):
            self.notice(line)
        for plan in plans:  # before anything is trained
            self.rows_at(plan.virtual_tokens_at)
        for line in self._collisions(plans):
            self.notice(line)

    # ---- rows

    def rows_at(self, place: str | None) -> EncodedRows:
        """The rows with virtual tokens at a place, where the settings say if it is None; encoded once."""
        place = place or self.settings.virtual_tokens_at
        if place not in self._rows:
            self._rows[place] = encoded_rows(self._encoder(place), self.dataset, _quiet, _quiet)
        return self._rows[place]

    def rows_of(self, name: str) -> EncodedRows:
        """The rows with virtual tokens where the plan `name` has them."""
        return self.rows_at(self.plans[name].virtual_tokens_at)

    def examples_at(self, place: str | None) -> Examples:
        """The rows to train on, as `rows_at`."""
        return self.rows_at(place).prepared.examples

    def place_of(self, name: str) -> str:
        """Where the virtual tokens of the plan `name` stand; "start" where it has none."""
        plan = self.plans[name]
        return (plan.virtual_tokens_at or self.settings.virtual_tokens_at) if plan.method.virtual_length else "start"

    def _collisions(self, plans: Sequence[Plan]) -> list[str]:
        """What is wrong with where virtual tokens stand, and whose; without any, with the template's system turn."""
        at: dict[str, list[str]] = {}
        for plan in plans:
            if plan.method.virtual_length:
                at.setdefault(self.place_of(plan.name), []).append(plan.name)
        rows, found = self.dataset.rows[:LOOKED_AT], dict[str, list[str]]()
        for place, names in at.items():
            for one in collisions(self.rows_at(place).encoder, rows):
                found.setdefault(str(one), []).extend(names)
        if not at:
            found = {str(one): [] for one in collisions(self.encoder, rows, virtual=False)}
        return [self.named(f"warning: {line}", ", ".join(names) or None) for line, names in found.items()]

    def _encoder(self, place: str) -> Encoder:
        template, tokenizer = self.dataset.template, self.base.tokenizer
        size = table_size(self.base.model)
        return encoder_of(template)(tokenizer, template, self.settings.max_length, place, self.limit, size)

    # ---- learners

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
        notes |= {"virtual_tokens_at": self.place_of(name), "dtype": self.dtype}
        self.bank.save(name, path, notes=notes)


def _quiet(*_: object) -> None:
    """What there is to say was said of the rows at the settings' place."""
