"""Who stays in a race: a function of the contenders' scores on the choosing rows and of nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.evaluation.compare import HIGHER
from inlay.evaluation.intervals import FEW, mean_interval
from inlay.runs.progress import Progress
from inlay.runs.settings import plan_record
from inlay.runs.turns import Selection
from inlay.training.plan import Plan

from .rungs import Shares, kept, rungs_of, shares_for

__all__ = ["Halving", "shares_of", "teams_of", "twin_of"]

TELLS = 1
"""The first rung at which a contender is dropped for being worse beyond chance: before it, rates are still growing
into their courses, and a fast start says little of the end. By rank it may leave at any."""


def twin_of(plan: Plan) -> str:
    """What contenders share that differ in their seed alone: they stay or leave together."""
    record = plan_record(plan)
    return json.dumps({name: value for name, value in record.items() if name not in ("name", "seed")}, sort_keys=True)


def teams_of(plans: Sequence[Plan]) -> int:
    """How many contenders there are, twins counted once."""
    return len({twin_of(plan) for plan in plans})


def shares_of(plans: Sequence[Plan]) -> Shares:
    """The rungs of a race of these plans, which say how many steps they have; none where there are no plans, or their
    courses are too short."""
    return shares_for(teams_of(plans), min(plan.steps or 0 for plan in plans)) or () if plans else ()


@dataclass(frozen=True)
class _Team:
    """Twins that have come to a rung, in one place of the ranking: their scores' mean `value`, lower being better, and
    the mean of their `rows`, (3, rows): losses, tokens and hits. `arriving` ones have just taken the step to it."""

    members: Sequence[Progress]
    value: float
    rows: Tensor
    arriving: bool


class Halving:
    """The rule of a race with rungs at the `shares` of courses, `at_once` contenders at most being in the stream.

    Of all that have come to a rung so far the best third stays, and of those who is not worse than the best one beyond
    chance (95 %, paired over rows).
    """

    def __init__(self, shares: Shares, at_once: int | None = None) -> None:
        self.shares, self.at_once = shares, at_once

    def due(self, own: Progress) -> bool:
        """Whether a contender stands on a rung after its last step."""
        return own.learner.step in rungs_of(own.learner.total, self.shares)

    def select(self, progress: Sequence[Progress], waiting: Sequence[Plan]) -> Selection:
        """Who leaves when contenders come to a rung, and who takes the places of those that left."""
        stop: dict[str, str] = {}
        for rung in range(len(self.shares) - 1):
            if any(one.learner.live and one.learner.step == self._step(one, rung) for one in progress):
                stop |= _leaving(self._teams(progress, rung), rung)
        live = sum(one.learner.live and one.name not in stop for one in progress)
        room = len(waiting) if self.at_once is None else max(0, self.at_once - live)
        return Selection(stop, [plan.name for plan in waiting[:room]])

    def _step(self, own: Progress, rung: int) -> int:
        return rungs_of(own.learner.total, self.shares)[rung]

    def _teams(self, progress: Sequence[Progress], rung: int) -> list[_Team]:
        """Those that have come to a rung before the end, the best first; equal ones as the race lists them."""
        twins: dict[str, list[Progress]] = {}
        for one in progress:
            twins.setdefault(twin_of(one.learner.plan), []).append(one)
        found = [self._team(members, rung) for members in twins.values()]
        return sorted((team for team in found if team is not None), key=lambda team: team.value)

    def _team(self, members: Sequence[Progress], rung: int) -> _Team | None:
        """Twins at a rung; None where one of them is yet to come."""
        sound = [one for one in members if not one.learner.diverged]
        step = self._step(members[0], rung)
        places = [_place(one, step) for one in sound]
        there = [n for n in places if n is not None]
        if not sound or len(there) < len(sound):
            return None
        arriving = any(one.learner.live and one.learner.step == step for one in sound)
        metric = sound[0].best.metric
        value = sum(one.best.scores[n][metric] for one, n in zip(sound, there, strict=True)) / len(sound)
        whole = math.isfinite(value) and len(sound) == len(members)
        value = math.inf if not whole else -value if metric in HIGHER else value
        rows = torch.stack([one.best.rows[n] for one, n in zip(sound, there, strict=True)]).mean(0)
        return _Team(sound, value, rows, arriving)


def _place(one: Progress, step: int) -> int | None:
    """Which of its scores is the one after `step`."""
    return next((n for n, line in enumerate(one.best.scores) if line["step"] == step), None)


def _leaving(teams: Sequence[_Team], rung: int) -> dict[str, str]:
    """Why those leave that have just come."""
    found: dict[str, str] = {}
    for place, team in enumerate(teams):
        if not team.arriving:
            continue
        if place >= kept(len(teams)):
            why = f"dropped at rung {rung + 1}: place {place + 1} of {len(teams)}"
        elif place and rung >= TELLS and _worse(team, teams[0]):
            why = f"dropped at rung {rung + 1}: worse than {teams[0].members[0].name} beyond chance"
        else:
            continue
        found |= {one.name: why for one in team.members if one.learner.live and not one.kept}
    return found


def _worse(own: _Team, best: _Team) -> bool:
    """Whether the difference to the best one leaves zero out."""
    if own.rows.shape != best.rows.shape or own.rows.shape[-1] < FEW:
        return False
    higher = own.members[0].best.metric in HIGHER
    apart = best.rows[2] - own.rows[2] if higher else own.rows[0] - best.rows[0]
    found = mean_interval(apart.numpy(), own.rows[1].numpy())
    return found is not None and found[0] > 0
