"""What a decoded token takes more with each contender than with the base alone, measured when all else is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inlay.bases.heads import can_write
from inlay.data.encode import Example
from inlay.data.prepare import token_counts
from inlay.runs.context import Context
from inlay.runs.progress import Progress
from inlay.runtime.latency import Clock, added_time
from inlay.runtime.tasks import GENERATE

from .places import rank
from .rungs import Shares

__all__ = ["SHARE", "measured_latency"]

EACH = 2.0
"""Seconds for one contender."""
SHARE = 0.05
"""Of the race's time that those may take that did not finish; those that did are measured in any case."""
LEAST = 10.0
"""Seconds that they may take in a short race."""
CANNOT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, MemoryError)
"""What transformers raises where a base that scores cannot generate."""


def measured_latency(
    context: Context, progress: Sequence[Progress], shares: Shares, clock: Clock = time.perf_counter
) -> Mapping[str, Any]:
    """What run.json keeps: `base_token_ms`, and of each contender that was measured `added_token_ms`, with the middle
    half of its pairs; and `unmeasured`, why there is nothing.

    Those that finished come first, and the winner; the others as long as `SHARE` of the race's time lasts, or `LEAST`.
    """
    sound = [own for own in progress if not own.learner.diverged]
    if context.task is not GENERATE or not can_write(context.bank.model):
        return _without(context, "this base writes no text here, so that no token of an answer takes time")
    if not sound:
        return _without(context, "all contenders diverged")
    sound.sort(key=lambda own: rank(own, shares))
    always = {sound[0].name} | {own.name for own in sound if own.learner.step >= own.learner.total}
    begun, found, why = clock(), dict[str, Any](), ""
    allowed, base = max(LEAST, SHARE * max(own.seconds for own in progress)), list[float]()
    for own in sorted(sound, key=lambda own: own.name not in always):
        if own.name not in always and clock() - begun > allowed:
            break
        prompt = _middle(context.rows_of(own.name).prepared.examples)
        try:
            added = added_time(context.bank, own.name, prompt, EACH, clock)
        except CANNOT as error:
            why = why or (str(error) or type(error).__name__).splitlines()[0]
            continue
        base.append(added.base)
        found[own.name] = {"ms": 1e3 * added.median, "quartiles": [1e3 * end for end in added.quartiles],
                           "pairs": added.pairs}  # fmt: skip
    if not found:
        return _without(context, f"this base cannot generate here ({why})")
    latency = {"base_token_ms": 1e3 * float(np.median(base)), "added_token_ms": found, "unmeasured": None}
    first = next(iter(found))
    context.on_message(
        f"a decoded token takes {latency['base_token_ms']:.3g} ms with the base alone, and with {first} "
        f"{found[first]['ms']:+.2g} ms"
    )
    return {"latency": latency}


def _without(context: Context, why: str) -> Mapping[str, Any]:
    context.on_message(f"the time of a decoded token is not measured: {why}")
    return {"latency": {"base_token_ms": None, "added_token_ms": {}, "unmeasured": why}}


def _middle(examples: Sequence[Example]) -> Example:
    """An example of the middle length."""
    return examples[int(np.argsort(token_counts(examples), kind="stable")[len(examples) // 2])]
