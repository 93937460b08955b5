"""The rungs of a race: shares of each contender's course after which it is compared, known before the first step.

Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) in the asynchronous form of ASHA (Li et al. 2020,
arXiv:1810.05934): of those that have come to a rung, the best KEEP-th go on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["KEEP", "LEAST", "Shares", "choices", "kept", "rungs_of", "scored", "shares_for", "work"]

KEEP = 3
"""One of so many goes on at a rung, and courses between rungs grow as much."""
MOST = 3
"""Rungs, the end of a course among them: a first look at a ninth of it is early enough."""
LEAST = 2
"""Steps to the first rung: the first one moves nothing but a start."""

Shares = Sequence[float]
"""The shares of a course at whose end contenders are compared; the last one is 1."""


def choices(contenders: int) -> list[Shares]:
    """What the rungs of so many contenders may be, the cheapest first: fewer where courses are short."""
    most = min(MOST, 1 + max(1, round(math.log(max(contenders, 2), KEEP))))
    return [tuple(float(KEEP) ** -(rungs - 1 - rung) for rung in range(rungs)) for rungs in range(most, 1, -1)]


def shares_for(contenders: int, steps: int) -> Shares | None:
    """The rungs of a race whose shortest course has so many steps; None where that is too short for any."""
    return next((shares for shares in choices(contenders) if rungs_of(steps, shares)[0] >= LEAST), None)


def rungs_of(total: int, shares: Shares) -> tuple[int, ...]:
    """The steps after which a contender of `total` steps stands on a rung."""
    return tuple(max(1, round(share * total)) for share in shares)


def kept(arrived: int) -> int:
    """How many go on of those that have come to a rung."""
    return max(1, -(-arrived // KEEP))


def work(contenders: int, shares: Shares) -> float:
    """What a race takes, in whole courses of one contender, where nobody leaves by chance alone."""
    there, before, total = contenders, 0.0, 0.0
    for share in shares:
        total += there * (share - before)
        there, before = kept(there), share
    return total


def scored(contenders: int, shares: Shares) -> Sequence[int]:
    """How many are scored at each rung."""
    counts, there = [], contenders
    for _ in shares:
        counts.append(there)
        there = kept(there)
    return counts
