"""How the learning rate goes over a run."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "rates"]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}
"""What is left of the rate when a share of the steps behind the warm-up is done."""


def rates(name: str, warmup: int, steps: int) -> Callable[[int], float]:
    """By what the learning rate of a step (from 0) is multiplied: it grows for `warmup` steps, then follows `name`.

    Importing transformers' own, which gives the same, takes a quarter of a second and all of peft where that is.
    """

    def rate(step: int) -> float:
        if step < warmup:
            return step / warmup
        return max(0.0, SCHEDULES[name]((step - warmup) / max(1, steps - warmup)))

    return rate
