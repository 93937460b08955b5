"""What training took each contender of a race: its share of the time, and its memory, when all else is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from inlay.data.typical import typical_rows
from inlay.errors import InlayError
from inlay.runs.context import Context
from inlay.runs.estimate import LearnerMemory, learner_memory
from inlay.runs.progress import Progress
from inlay.runs.timing import Clock, gradient_seconds

from .places import rank
from .rungs import Shares

__all__ = ["SHARE", "measured_training", "shared_seconds"]

TOKENS = 192
"""Of a step that is timed, virtual ones left out."""
ROUNDS = 3
SHARE = 0.02
"""Of the race's time that the timed steps may take."""
LEAST = 5.0
"""Seconds that they may take in a short race."""
CANNOT = (InlayError, MemoryError, RuntimeError)


def measured_training(
    context: Context, progress: Sequence[Progress], shares: Shares, clock: Clock = time.perf_counter
) -> Mapping[str, Any]:
    """What run.json keeps as `training`: `seconds` of the race from its rows to its last step, scoring left out, and of
    each of the `contenders` its share of them, `seconds`; `token_ms`, milliseconds a token of a step of its own, None
    where the time did not reach it; and `memory_mb`, by part and in all (`LearnerMemory`)."""
    seconds = max(own.seconds for own in progress)
    timed = _token_seconds(context, _in_turn(progress, shares), max(LEAST, SHARE * seconds), clock)
    methods = {own.name: _method(own) for own in progress}
    parts = shared_seconds(seconds, {own.name: own.learner.tokens for own in progress}, timed, methods)
    found = {
        own.name: {
            "seconds": parts[own.name], "token_ms": 1e3 * timed[own.name] if own.name in timed else None,
            "memory_mb": _parts(_memory(context, own)),
        }
        for own in progress
    }  # fmt: skip
    return {"training": {"seconds": seconds, "contenders": found}}


def shared_seconds(
    seconds: float, tokens: Mapping[str, int], timed: Mapping[str, float], methods: Mapping[str, str]
) -> dict[str, float]:
    """`seconds` of a stream, shared by the `tokens` that each contender trained on times what a token takes it:

        seconds_i = seconds * tokens_i * w_i / sum_j tokens_j * w_j

    w_i is what was `timed`; where it was not, the mean of those with the same of `methods`, or else of all.
    """
    means: dict[str, list[float]] = {}
    for name, own in timed.items():
        means.setdefault(methods[name], []).append(own)
    usual = fmean(timed.values()) if timed else 1.0
    weights = {n: timed[n] if n in timed else fmean(means.get(methods[n], [usual])) for n in tokens}
    whole = sum(count * weights[name] for name, count in tokens.items())
    return {name: seconds * count * weights[name] / whole if whole else 0.0 for name, count in tokens.items()}


def _method(own: Progress) -> str:
    return type(own.learner.plan.method).__name__


def _in_turn(progress: Sequence[Progress], shares: Shares) -> list[Progress]:
    """The best of each method first, so that each has a time."""
    ranked, seen = sorted(progress, key=lambda own: rank(own, shares)), set[str]()
    first = []
    for own in ranked:
        if _method(own) not in seen:
            seen.add(_method(own))
            first.append(own)
    return [*first, *(own for own in ranked if own not in first)]


def _token_seconds(context: Context, progress: Sequence[Progress], allowed: float, clock: Clock) -> dict[str, float]:
    """Seconds a token of forward and backward of some rows with one contender alone, the fastest of some rounds. The
    very first step does not count: it meets what is cold."""
    found: dict[str, float] = {}
    begun, turns = clock(), [*progress[:1], *(own for _ in range(ROUNDS) for own in progress)]
    for number, own in enumerate(turns):
        if number > 1 and clock() - begun > allowed:
            break
        rows = typical_rows(context.rows_of(own.name).prepared.examples, TOKENS)
        try:
            with own.learner.averaged_weights():
                taken = gradient_seconds(
                    context.bank, own.learner, rows, context.budget, context.task,
                    context.settings.gradient_checkpointing, clock,
                )  # fmt: skip
        except CANNOT:  # the race itself is done
            continue
        if number:
            a_token = taken / sum(len(row.ids) for row in rows)
            found[own.name] = min(found.get(own.name, a_token), a_token)
    return found


def _memory(context: Context, own: Progress) -> LearnerMemory | None:
    """None where there is no memory left to look."""
    examples, recompute = context.rows_of(own.name).prepared.examples, context.settings.gradient_checkpointing
    scored = bool(len(context.choosing))
    try:
        return learner_memory(context.bank, own.learner, examples, context.budget, context.task, scored, recompute)
    except CANNOT:
        return None


def _parts(memory: LearnerMemory | None) -> dict[str, float] | None:
    return None if memory is None else {**asdict(memory), "total": memory.total}
