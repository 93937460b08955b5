"""What is answered of each candidate, from what was counted and measured; pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from .candidates import Candidate
from .counting import Cost
from .measuring import Line, Pace
from .settings import Limits

__all__ = ["Answer", "Course", "answers", "heldout_rows", "misses"]

FAR = 10
"""By how many times more an adapter may train than those it is compared with, before their time is only a bound."""
BOUND = "at least"
SURE, POWER = 1.959964, 0.841621
"""Quantiles of the normal distribution: 97.5 %, for an interval of 95 %, and 80 %."""


@dataclass(frozen=True)
class Course:
    """`steps` of `tokens` each in the mean."""

    steps: int
    tokens: float


@dataclass(frozen=True)
class Answer:
    """A candidate with its cost; `step` and `seconds` of training are predicted.

    `token_ms` is what a token of an answer takes, merged where it merges; None where the base writes none. `how` says
    how time was had: "measured", or "as" another candidate. `misses` names the limits that it is beyond.
    """

    candidate: Candidate
    cost: Cost
    step: float
    seconds: float
    token_ms: float | None
    how: str
    misses: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.misses

    def record(self) -> dict[str, Any]:
        """As JSON."""
        cost = self.cost
        return {
            "method": self.candidate.method, "set": dict(self.candidate.set), "label": self.candidate.label,
            "trainable_parameters": cost.trained, "file_mb": cost.file_mb, "memory_mb": cost.memory_mb,
            "least_mb": cost.least_mb, "step_seconds": self.step, "seconds": self.seconds,
            "added_tokens": cost.tokens, "token_ms": self.token_ms, "merges": cost.merges, "how": self.how,
            "fits": self.fits, "misses": list(self.misses),
        }  # fmt: skip


def answers(
    costs: Mapping[Candidate, Cost], paces: Mapping[Candidate, Pace], line: Line, base_token: float | None,
    course: Course, limits: Limits,
) -> list[Answer]:  # fmt: skip
    """An answer for each of `costs`, in their order. The first of `paces` is the one that `line` was measured with."""
    found = []
    reference = next(iter(paces.values()))
    for candidate, cost in costs.items():
        pace, like = _pace(candidate, paces)
        how = "measured" if candidate in paces else f"as {' and '.join(one.label for one in like)}"
        if cost.trained > FAR * max(costs[one].trained for one in like):
            how = f"{BOUND} {how}"
        step = pace.seconds(reference, line.seconds(course.tokens))
        token = base_token if cost.merges else pace.token
        answer = Answer(candidate, cost, step, step * course.steps, None if token is None else 1e3 * token, how)
        found.append(replace(answer, misses=misses(answer, limits)))
    return found


def _pace(candidate: Candidate, paces: Mapping[Candidate, Pace]) -> tuple[Pace, list[Candidate]]:
    """What was measured of the candidate; else of its method in another size, of its group in the mean, or of the
    first one measured. With those that it was measured of."""
    if candidate in paces:
        return paces[candidate], [candidate]
    if alike := next((one for one in paces if one.method == candidate.method), None):
        return paces[alike], [alike]
    group = [one for one in paces if one.group == candidate.group]
    if group:
        tokens = [token for one in group if (token := paces[one].token) is not None]
        return Pace(fmean(paces[one].step for one in group), fmean(tokens) if tokens else None), group
    first = next(iter(paces))
    return paces[first], [first]


def misses(answer: Answer, limits: Limits) -> tuple[str, ...]:
    """The limits that an answer is beyond, in words. Memory is missed where not even one row at a time fits."""
    found = []
    cost = answer.cost
    if limits.memory_mb is not None and cost.least_mb > limits.memory_mb:
        found.append(f"memory: {cost.least_mb:,.0f} MB at least")
    if limits.seconds is not None and answer.seconds > limits.seconds:
        found.append(f"time: {answer.seconds:,.0f} s")
    elif limits.seconds is not None and answer.how.startswith(BOUND):
        found.append("time: not measured, --seconds was too short")
    if limits.file_mb is not None and cost.file_mb > limits.file_mb:
        found.append(f"file: {cost.file_mb:,.2f} MB")
    if limits.token_ms is not None and answer.token_ms is None:
        found.append("latency: not measured, --seconds was too short")
    elif limits.token_ms is not None and answer.token_ms is not None and answer.token_ms > limits.token_ms:
        found.append(f"latency: {answer.token_ms:,.1f} ms a token")
    return tuple(found)


def heldout_rows(points: float = 1.0, disagree: float = 0.12) -> tuple[int, int]:
    """How many held-out rows tell two models apart whose accuracy differs by `points` of 100, where they disagree on a
    share `disagree` of the rows: for a 95 % interval of the paired difference that leaves out zero when just that
    difference is seen, and for four chances in five that it does (Connor 1987, Biometrics 43, for McNemar's test).

        n = z^2 d / p^2        n = (z sqrt(d) + z' sqrt(d - p^2))^2 / p^2
    """
    p = points / 100
    d = max(disagree, p)  # models that differ by p disagree on as many rows at least
    seen = SURE**2 * d / p**2
    likely = (SURE * d**0.5 + POWER * max(0.0, d - p * p) ** 0.5) ** 2 / p**2
    return _up(seen), _up(likely)


def _up(value: float) -> int:
    return -int(-value // 1)
