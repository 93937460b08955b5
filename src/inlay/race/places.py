"""The places of a race that is under way, as its board shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inlay.evaluation.compare import HIGHER
from inlay.evaluation.intervals import Interval, mean_interval, wilson
from inlay.methods.table import METHODS
from inlay.runs.progress import Progress
from inlay.training.plan import Plan
from inlay.values import fields_of

from .contenders import Contender
from .rungs import Shares, rungs_of
from .standings import order

__all__ = ["Place", "line_of", "passed", "places", "rank"]

MANY = 8
"""Items of a setting from which on it is no word for people."""

Known = dict[tuple[str, int], Interval | None]
"""By a contender and how many scores it has, the interval of the last one."""


@dataclass(frozen=True)
class Place:
    """A contender: its last `score` on the choosing rows with its 95 % interval, None where there is none yet, and
    where it stands in its course."""

    name: str
    line: str
    score: float | None
    interval: Interval | None
    tokens: int
    step: int
    total: int | None
    loss: float
    state: str


def places(
    progress: Sequence[Progress], waiting: Sequence[Plan], shares: Shares, known: Known | None = None
) -> list[Place]:
    """The contenders, the best first: those that came further, then by their best score; those that wait are last.

    `known` keeps intervals from one call to the next.
    """
    known = {} if known is None else known
    found = [_place(own, known) for own in sorted(progress, key=lambda own: rank(own, shares))]
    nan = float("nan")
    return found + [Place(plan.name, line_of(plan), None, None, 0, 0, plan.steps, nan, "waiting") for plan in waiting]


def rank(own: Progress, shares: Shares) -> tuple[int, float]:
    """What `standings` places a contender by, of one in training: less is better."""
    metric, scores = own.best.metric, own.best.scores
    best = min((order(line.get(metric), metric) for line in scores), default=float("inf"))
    return -passed(own, shares), best


def passed(own: Progress, shares: Shares) -> int:
    """How many rungs it was scored at."""
    last = own.best.scores[-1]["step"] if own.best.scores else 0
    return sum(step <= last for step in rungs_of(own.learner.total, shares))


def line_of(plan: Plan) -> str:
    """A contender's settings in one line."""
    kind = type(plan.method)
    name = next((name for name, known in METHODS.items() if known is kind), None)
    if name is None:
        return kind.title
    own = {field.name: getattr(plan.method, field.name) for field in fields_of(kind)}
    told = {
        field.name: own[field.name] for field in fields_of(kind)
        if own[field.name] != field.default and not (isinstance(own[field.name], tuple) and len(own[field.name]) > MANY)
    }  # fmt: skip
    return Contender(plan.name, name, told, {"lr": plan.rate, "virtual_tokens_at": plan.virtual_tokens_at}).line()


def _place(own: Progress, known: Known) -> Place:
    learner, metric = own.learner, own.best.metric
    scores = own.best.scores
    score, key = scores[-1].get(metric) if scores else None, (own.name, len(scores))
    if scores and key not in known:
        known[key] = _interval(own)
    return Place(
        own.name, line_of(learner.plan), score, known.get(key), learner.tokens, learner.step,
        learner.total, learner.loss, learner.stopped or "training",
    )  # fmt: skip


def _interval(own: Progress) -> Interval | None:
    """Of the last score, where it is the loss or a share of rows that are right."""
    if not own.best.rows:
        return None
    nats, tokens, hits = own.best.rows[-1].numpy()
    if own.best.metric == "accuracy" and (tokens == 1).all():
        return wilson(int(hits.sum()), len(hits))
    if own.best.metric in HIGHER:
        return None
    return mean_interval(nats, tokens) if own.best.metric == "loss" else None
