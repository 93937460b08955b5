"""What an experiment has found so far: figures of each arm, and how later arms differ from the first."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import reduce
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
        Comparisons are made inside phases between which weights moved, since what users think drifts with time.
        """
        with self._lock:
            counts, seen = self.store.counts(experiment.name), self._look(experiment.name)
            arms = [*experiment.arms, *sorted({*counts, *seen.given} - {*experiment.arms})]
            total = sum(experiment.arms.values())
            figures = [_arm(arm, experiment.arms.get(arm, 0.0), total, counts.get(arm, Counts()), seen) for arm in arms]
            compared = _compared(list(experiment.arms), seen)
        return {"name": experiment.name, "level": LEVEL, "arms": figures, "comparisons": compared}

    def _look(self, name: str) -> _Seen:
        given = self.store.feedback(name)
        seen = self._seen.get(name)
        numbers = [one.number for one in given]
        if seen is None or numbers[: len(seen.numbers)] != seen.numbers:  # dropped and made again
            seen = self._seen[name] = _Seen()
        new = given[len(seen.numbers) :]
        for place in dict.fromkeys((one.phase, one.arm) for one in new):
            seen.bets.setdefault(place, Bets()).add([o.value for o in new if o.first and (o.phase, o.arm) == place])
        seen.given.update(one.arm for one in new)
        seen.numbers, seen.phases = numbers, self.store.phases(name)
        self._seen.move_to_end(name)
        while len(self._seen) > MOST:
            self._seen.popitem(last=False)
        return seen


class _Seen:
    """What has been read: the `numbers` of feedback, bets by phase and arm, how much was `given` to each arm, and the
    weights of all `phases`.
    """

    def __init__(self) -> None:
        self.phases: dict[int, dict[str, float]] = {}
        self.numbers: list[int] = []
        self.bets: dict[tuple[int, str], Bets] = {}
        self.given: Counter[str] = Counter()

    def of(self, arm: str) -> Bets:
        """Bets of all phases."""
        return reduce(Bets.joined, (bets for (_, name), bets in self.bets.items() if name == arm), Bets())

    def pairs(self, first: str, second: str) -> list[tuple[Bets, Bets]]:
        """Bets of the phases in which both arms could have values: which have some is no matter of what they are."""
        both = [phase for phase, arms in self.phases.items() if arms.get(first) and arms.get(second)]
        return [(self.bets.get((phase, first)) or Bets(), self.bets.get((phase, second)) or Bets()) for phase in both]


def _arm(name: str, weight: float, total: float, counts: Counts, seen: _Seen) -> dict[str, Any]:
    bets = seen.of(name)
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
            "mean": bets.mean, "interval": bets.interval(), "n": bets.count, "given": seen.given[name],
        },
    }  # fmt: skip


def _times(count: int, total: float, squares: float) -> tuple[float | None, Interval | None]:
    """The mean and its interval, in milliseconds."""
    if not count:
        return None, None
    found = mean_interval(count, total, squares)
    return 1e3 * total / count, None if found is None else (max(0.0, 1e3 * found[0]), 1e3 * found[1])


def _compared(arms: Sequence[str], seen: _Seen) -> list[dict[str, Any]]:
    """Each arm beside the first. With several of them each is asked for more, so that one false alarm among all is as
    rare as LEVEL says (Bonferroni)."""
    against, *others = arms
    made = []
    for arm in others:
        pairs = seen.pairs(against, arm)
        interval, p = difference(pairs, 1 - (1 - LEVEL) / len(others))
        p = min(1.0, p * len(others))
        found = {"difference": _seen_difference(pairs), "interval": interval, "p": p, "differs": p < 1 - LEVEL}
        made.append({"arm": arm, "against": against, **found})
    return made


def _seen_difference(pairs: Sequence[tuple[Bets, Bets]]) -> float | None:
    """That of means inside each phase, weighted as in Mantel and Haenszel's estimate; None without values of both."""
    pairs = [(one, two) for one, two in pairs if one.count and two.count]
    weights = [one.count * two.count / (one.count + two.count) for one, two in pairs]
    apart = [two.total / two.count - one.total / one.count for one, two in pairs]
    return sum(w * d for w, d in zip(weights, apart, strict=True)) / sum(weights) if pairs else None
