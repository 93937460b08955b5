"""What an experiment has found so far: figures of each arm, and how later arms differ from the first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from .arms import Experiment
from .sequential import LEVEL, Bets, Interval, difference, mean_interval, share_interval
from .store import Counts, Store

__all__ = ["Results"]

MOST = 256
"""Experiments whose bets are kept; others are computed anew when somebody looks."""


class Results:
    """Reads `store`. Bets go on from where they were at the last look."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, experiment: Experiment) -> dict[str, Any]:
        """Figures of all arms, those that were taken out (weight 0) behind the others.

        Each unit (a user, a session, else a request) counts once in the mean of feedback, its interval and the
        comparisons: by the first value that it gave. Answers to one user are alike, and tests take values to be apart.
        """
        with self._lock:
            counts, seen = self.store.counts(experiment.name), self._look(experiment.name)
            arms = [*experiment.arms, *sorted({*counts, *seen.bets} - {*experiment.arms})]
            total = sum(experiment.arms.values())
            figures = [_arm(arm, experiment.arms.get(arm, 0.0), total, counts.get(arm, Counts()), seen) for arm in arms]
            compared = _compared([(arm, seen.bets.get(arm) or Bets()) for arm in experiment.arms])
        return {"name": experiment.name, "level": LEVEL, "arms": figures, "comparisons": compared}

    def _look(self, name: str) -> _Seen:
        given = self.store.feedback(name)
        seen = self._seen.get(name)
        numbers = [one.number for one in given]
        if seen is None or numbers[: len(seen.numbers)] != seen.numbers:  # dropped and made again
            seen = self._seen[name] = _Seen()
        new = given[len(seen.numbers) :]
        for arm in dict.fromkeys(one.arm for one in new):
            own = [one for one in new if one.arm == arm]
            seen.bets.setdefault(arm, Bets()).add([one.value for one in own if one.first])
            seen.given[arm] = seen.given.get(arm, 0) + len(own)
        seen.numbers = numbers
        self._seen.move_to_end(name)
        while len(self._seen) > MOST:
            self._seen.popitem(last=False)
        return seen


class _Seen:
    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.bets: dict[str, Bets] = {}
        self.given: dict[str, int] = {}


def _arm(name: str, weight: float, total: float, counts: Counts, seen: _Seen) -> dict[str, Any]:
    bets = seen.bets.get(name) or Bets()
    judged = counts.requests - counts.left
    first = _times(counts.first_count, counts.first_sum, counts.first_squares)
    between = _times(counts.between_count, counts.between_sum, counts.between_squares)
    return {
        "name": name, "weight": weight, "share": weight / total, "requests": counts.requests,
        "errors": counts.failed, "left": counts.left,
        "error_rate": {
            "mean": counts.failed / judged if judged else None, "interval": share_interval(counts.failed, judged),
            "n": judged,
        },
        "prompt_tokens": counts.prompt_tokens, "completion_tokens": counts.completion_tokens,
        "ttft_ms": first[0], "ttft_ms_interval": first[1], "between_ms": between[0], "between_ms_interval": between[1],
        "feedback": {
            "mean": bets.mean, "interval": bets.interval(), "n": bets.count, "given": seen.given.get(name, 0),
        },
    }  # fmt: skip


def _times(count: int, total: float, squares: float) -> tuple[float | None, Interval | None]:
    """The mean and its interval, in milliseconds."""
    if not count:
        return None, None
    found = mean_interval(count, total, squares)
    return 1e3 * total / count, None if found is None else (max(0.0, 1e3 * found[0]), 1e3 * found[1])


def _compared(arms: Sequence[tuple[str, Bets]]) -> list[dict[str, Any]]:
    """Each arm beside the first. With several of them each is asked for more, so that one false alarm among all is as
    rare as LEVEL says (Bonferroni)."""
    if len(arms) < 2:
        return []
    (against, control), *others = arms
    level = 1 - (1 - LEVEL) / len(others)
    made = []
    for arm, bets in others:
        interval, p = difference(control, bets, level)
        p = min(1.0, p * len(others))
        seen = None if bets.mean is None or control.mean is None else bets.mean - control.mean
        made.append(
            {"arm": arm, "against": against, "difference": seen, "interval": interval, "p": p, "differs": p < 1 - LEVEL}
        )  # fmt: skip
    return made
