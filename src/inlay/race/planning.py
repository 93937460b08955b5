"""The contenders of a race as plans: those that can act on the base, with courses as long as the budget allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

from inlay.data.prepare import Examples, prepare, token_counts
from inlay.data.targets import HeadEncoder, encoder_of, prepare_targets
from inlay.errors import UsageError
from inlay.evaluation.intervals import FEW
from inlay.evaluation.score import Items, items_of
from inlay.methods.contract import Method
from inlay.runs.fitting import fit_of
from inlay.runs.planning import Opened
from inlay.runs.session import MOST
from inlay.runtime.tasks import Task, task_of
from inlay.sites.positions import table_size
from inlay.training.plan import Course, Plan

from .budget import course_tokens, measured
from .contenders import Contender
from .halving import shares_of, teams_of, twin_of
from .rungs import LEAST, Shares, choices, rungs_of, work
from .settings import parse_budget

__all__ = ["able", "plans_for"]

SEEN = 256
"""Rows that are encoded to see how many tokens one has."""
TRIAL = "trial"
ENOUGH = 200
"""Choosing rows that tell 5 points of accuracy apart, of contenders that disagree on one row in eight."""


@dataclass(frozen=True)
class _Rows:
    """Some training rows as tokens, of `tokens` each in the mean, and choosing rows made ready to be scored."""

    examples: Examples
    tokens: float
    choosing: Items


def plans_for(opened: Opened, contenders: Sequence[Contender], asked: str | None) -> list[Plan]:
    """The plans of a race within the budget `asked` for, or of whole courses where there is none.

    Raises: UsageError where rows or budget are too few for one, or fewer than two contenders can act on the base.
    """
    task = task_of(opened.dataset.template, opened.bank, opened.base.fresh)
    task.check(opened.bank)
    _check_rows(opened)
    rows, settings = _rows(opened), opened.settings
    shared = {f.name: getattr(settings, f.name) for f in fields(Course) if f.name not in ("lr", "epochs", "steps")}
    contenders = _distinct(opened, able(opened, contenders, task), shared)
    _check_place(opened, contenders)
    passes = settings.epochs * len(opened.dataset.rows)
    whole = rows.tokens * (settings.steps * settings.batch_size if settings.steps else passes)
    short = [contender.plan(LEAST, shared) for contender in contenders]
    allowed = _Allowed(opened, short, task, rows, asked)
    for shares in choices(teams_of(short)):
        tokens = min(whole, allowed.tokens(shares))
        steps = [max(1, round(tokens / (rows.tokens * plan.batch_size))) for plan in short]
        plans = [contender.plan(own, shared) for contender, own in zip(contenders, steps, strict=True)]
        if shares_of(plans) == shares:
            _tell(opened, plans, rows.tokens)
            return plans
    raise _too_short(short, whole, rows.tokens, asked)


def able(opened: Opened, contenders: Sequence[Contender], task: Task) -> list[Contender]:
    """Those that can act on the base and be trained. The others are named, with the reason.

    Raises: UsageError where fewer than two are left.
    """
    found, reasons = [], dict[str, list[str]]()
    for contender in contenders:
        try:
            method = contender.plan(LEAST).method.with_tokenizer(opened.base.tokenizer)
            method.check_fit(method.sites(opened.bank.base))
            fit_of(opened.base.model, method, opened.settings.max_length)
            _try(opened, method, task)
            found.append(contender)
        except UsageError as error:
            reasons.setdefault(str(error), []).append(contender.name)
    for why, names in reasons.items():
        opened.on_message(f"left out: {', '.join(names)}: {why}")
    if len(found) < 2:
        what = f"{len(found)} of {len(contenders)} contenders can act on this base"
        raise UsageError(what, "Give another --space, or `inlay train` one method.")
    return found


def _distinct(opened: Opened, contenders: Sequence[Contender], shared: Mapping[str, Any]) -> list[Contender]:
    """Those that no other is equal to with the settings that all share. Raises: UsageError where one is left."""
    first, found = dict[tuple[str, int], str](), list[Contender]()
    for contender in contenders:
        plan = contender.plan(LEAST, shared)
        if (same := first.setdefault((twin_of(plan), plan.seed), plan.name)) == plan.name:
            found.append(contender)
        else:
            opened.on_message(f"left out: {plan.name}: with the settings of this race it is {same}")
    if len(found) < 2:
        raise UsageError(f"all contenders are {found[0].name} with the settings of this race", "Give another --space.")
    return found


def _try(opened: Opened, method: Method, task: Task) -> None:
    """Make the method's adapter and forget it, without what starts from data. Raises: UsageError where it cannot be."""
    methods = task.methods(method)
    if any(part.start_rows for own in methods for part in own.parts()):
        return
    opened.bank.add(TRIAL, methods, seed=0)
    opened.bank.remove(TRIAL)


def _check_place(opened: Opened, contenders: Sequence[Contender]) -> None:
    """Raises: UsageError where nobody's virtual tokens can stand where the settings say."""
    place = opened.settings.virtual_tokens_at
    if place != "start" and not any(contender.plan(LEAST).method.virtual_length for contender in contenders):
        what = f"no contender has virtual tokens to stand at {place}"
        raise UsageError(what, "Leave --virtual-tokens-at out, or name prompt in a --space of your own.")


def _check_rows(opened: Opened) -> None:
    """Raises: UsageError where nothing could be chosen by."""
    there = len(opened.dataset.choosing)
    if there < FEW:
        what = f"{there} held-out rows choose among the contenders, and fewer than {FEW} tell nothing apart"
        raise UsageError(what, f"Hold out more: --heldout (half of it chooses), {ENOUGH} rows for 5 points.")
    if there < ENOUGH:
        opened.on_message(
            f"{there} rows choose among the contenders: differences below {100 * 0.05 * math.sqrt(ENOUGH / there):.0f} "
            f"points of accuracy are chance; {ENOUGH} would tell 5 points apart (--heldout)"
        )


def _rows(opened: Opened) -> _Rows:
    settings, dataset, base = opened.settings, opened.dataset, opened.base
    encoder = encoder_of(dataset.template)(
        base.tokenizer, dataset.template, settings.max_length, settings.virtual_tokens_at, None, table_size(base.model)
    )
    some = dataset.rows[:SEEN]
    prepared = prepare_targets(encoder, some) if isinstance(encoder, HeadEncoder) else prepare(encoder, some)
    tokens = float(token_counts(prepared.examples).sum()) / len(some)
    return _Rows(prepared.examples, tokens, items_of(encoder, dataset.choosing[:SEEN]))


class _Allowed:
    """Tokens of a whole course within the budget that was `asked` for; the speed is measured once."""

    def __init__(self, opened: Opened, plans: Sequence[Plan], task: Task, rows: _Rows, asked: str | None) -> None:
        self.budget = None if asked is None else parse_budget(asked)
        self.teams, dataset = teams_of(plans), opened.dataset
        self.twins = len(plans) / self.teams
        words = len(dataset.template.verbalizer or ()) if dataset.template.kind == "label" else 1
        a_scoring = max(1, words) * rows.tokens * self.twins
        self.reading = a_scoring * min(MOST, len(dataset.choosing)), a_scoring * len(dataset.final)
        self.speed = None
        if self.budget is not None and self.budget.seconds is not None:
            self.speed = measured(opened, plans, task, rows.examples, rows.choosing)
            tokens, speed = self.budget.seconds * self.speed.training, self.speed.training
            opened.on_message(f"{asked} are about {tokens:,.0f} tokens at the {speed:,.0f} a second just measured")

    def tokens(self, shares: Shares) -> float:
        if self.budget is None:
            return math.inf
        return course_tokens(self.budget, self.speed, self.teams, shares, *self.reading) / self.twins


def _too_short(plans: Sequence[Plan], whole: float, a_row: float, asked: str | None) -> UsageError:
    """What to say where the first rung would come before anything is learned."""
    teams, a_step = teams_of(plans), a_row * min(plan.batch_size for plan in plans)
    shares = choices(teams)[-1]
    needed = next(steps for steps in count(LEAST) if rungs_of(steps, shares)[0] >= LEAST)
    if asked is None or whole < needed * a_step:
        what = f"a course of {max(1, round(whole / a_step))} steps is too short for a race, which needs {needed}"
        return UsageError(what, "Add --epochs, give more rows, or a smaller --batch-size.")
    least = needed * a_step * work(teams, shares) * len(plans) / teams
    what = f"a budget of {asked} does not take {teams} contenders to their first rung"
    return UsageError(what, f"The least is about {least:,.0f} tokens; or give fewer --contenders.")


def _tell(opened: Opened, plans: Sequence[Plan], a_row: float) -> None:
    teams, steps, shares = teams_of(plans), max(plan.steps or 0 for plan in plans), shares_of(plans)
    longest = max((plan.steps or 0) * plan.batch_size * a_row for plan in plans)
    total = longest * work(teams, shares) * len(plans) / teams
    rungs = ", ".join(f"{share * longest:,.0f}" for share in shares)
    opened.on_message(
        f"{len(plans)} contenders of at most {steps} steps; rungs after {rungs} tokens of each; about {total:,.0f} "
        f"tokens in all, where training all to the end would take {longest * len(plans):,.0f}"
    )
