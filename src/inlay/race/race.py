"""A race: a run of many contenders, of which the worse are dropped at rungs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from inlay.errors import UsageError
from inlay.files import write_json
from inlay.reporting.race_page import write_race_page
from inlay.runs.asking import Requests
from inlay.runs.command import command_parts
from inlay.runs.context import Context
from inlay.runs.folder import RunFolder
from inlay.runs.planning import Opened
from inlay.runs.progress import Progress
from inlay.runs.run import OnMessage, OnProgress, run
from inlay.runs.session import OnStep
from inlay.runs.turns import Selection
from inlay.training.plan import Plan

from .contenders import contenders
from .halving import Halving, shares_of
from .latency import measured_latency
from .planning import plans_for
from .rungs import Shares
from .settings import RaceSettings
from .space import read_space
from .standings import PLANNED, first_plans, standings
from .training_cost import measured_training

__all__ = ["OnTurn", "race"]

OnTurn = Callable[[Sequence[Progress], Sequence[Plan], Shares], None]
"""Sees the contenders so far, the plans that wait, and the rungs."""


def race(
    settings: RaceSettings, on_step: OnStep | None = None, on_message: OnMessage | None = None,
    on_progress: OnProgress | None = None, on_turn: OnTurn | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Race contenders on the same rows, and return what race.json holds: the best adapter is in `settings.out`/adapter.

    `on_turn` sees all contenders before the first step and after each one, and who waits. Raises: as `run`; UsageError
    where the space is empty, fewer than two contenders can act on the base, or the budget does not reach a first rung.
    """
    folder = RunFolder(settings.out)
    if settings.asked:
        if (answer := _ask(settings, folder)) is not None:
            return answer
        settings = settings.unasked()
    rules = _Rules(settings, folder, on_turn)
    with _page(settings, folder, on_message):
        own = replace(settings, open=False)  # which says nothing of the race
        run(own, on_step, on_message, on_progress, rules.plans, rules.select, rules.halving.due, rules.measure)
    folder.several = True
    result = standings(folder)
    if result["winner"] is not None:
        _keep(folder, result["winner"])
        result["adapter"] = str(folder.path / "adapter")
    write_json(folder.path / "race.json", result)
    write_race_page(folder.path, result, command_parts(folder.read(), command="race", kind=RaceSettings))
    return result


class _Rules:
    """What a race tells its run: the plans, who stays, and what is measured at the end.

    Raises: UsageError where the space cannot be read.
    """

    def __init__(self, settings: RaceSettings, folder: RunFolder, on_turn: OnTurn | None) -> None:
        earlier = folder.read() if settings.resume else {}
        self.settings, self.folder, self.space, self.on_turn = settings, folder, read_space(settings.space), on_turn
        self.halving = Halving(shares_of(first_plans(folder, earlier)), settings.at_once)
        self._said: list[str] = []

    def plans(self, opened: Opened) -> Sequence[Plan]:
        settings, on_message = self.settings, opened.on_message

        def say(line: str) -> None:
            self._said.append(line)
            on_message(line)

        opened = replace(opened, on_message=say)
        rows = len(opened.dataset.rows)
        tried = contenders(self.space, settings.contenders, seed=settings.seed, rows=rows, seeds=settings.seeds)
        if settings.contenders is not None and (there := len(tried) // settings.seeds) < settings.contenders:
            say(f"the space {settings.space} holds {there} contenders, not {settings.contenders}")
        made = plans_for(opened, tried, settings.budget)
        self.halving.shares = shares_of(made)
        return made

    def select(self, progress: Sequence[Progress], waiting: Sequence[Plan]) -> Selection:
        if not progress and self._said:  # the folder is this run's by now
            write_json(self.folder.path / PLANNED, self._said)
        if self.on_turn is not None:
            self.on_turn(progress, waiting, self.halving.shares)
        return self.halving.select(progress, waiting)

    def measure(self, context: Context, progress: Sequence[Progress]) -> Mapping[str, Any]:
        shares = self.halving.shares
        return {**measured_training(context, progress, shares), **measured_latency(context, progress, shares)}


def _page(settings: RaceSettings, folder: RunFolder, on_message: OnMessage | None) -> AbstractContextManager[Any]:
    if not settings.open:
        return nullcontext()
    from .live import Live

    return Live(folder.path, on_message or (lambda line: print(line, file=sys.stderr, flush=True)))


def _ask(settings: RaceSettings, folder: RunFolder) -> dict[str, Any] | None:
    """Leave what is asked for the race to find; None where that is over and goes on with it.

    Raises: UsageError where there is no race, or no such contender.
    """
    (ask,), record = settings.asked, folder.read()
    plans = record.get("plans") or {}
    if not plans:
        raise UsageError(f"{folder.path} holds no race", "Name the --out of one.")
    if ask.name not in plans and not folder.busy:
        raise UsageError(f"no contender is called {ask.name!r}", f"There are {', '.join(plans)}.")
    if folder.finished and ask.what == "stop":
        raise UsageError(f"the race in {folder.path} is over", "There is nothing to stop.")
    Requests(folder.requests).put(ask)
    if folder.busy:
        return {"asked": ask.to_dict(), "status": "running"}
    return None


def _keep(folder: RunFolder, winner: str) -> None:
    """Copy the winner's adapter to where a run of one has its own."""
    place, beside = folder.path / "adapter", folder.path / ".adapter.part"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(folder.best(winner), beside)
    if place.exists():
        shutil.rmtree(place)
    beside.rename(place)
