"""Which arm of an experiment somebody gets: by a hash, so that it stays the same without any state."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from inlay.errors import UsageError

__all__ = ["Experiment", "Trial", "draw", "make_experiment", "unit_of"]

MOST = 16
"""Arms of one experiment."""
LONGEST = 200
"""Characters of an alias."""


@dataclass(frozen=True)
class Experiment:
    """An alias `name`, and how often each of its `arms` answers: weights of 0 or more, of any sum. `phase` counts how
    often arms or weights have changed.
    """

    name: str
    arms: Mapping[str, float]
    phase: int = 0


@dataclass(eq=False)
class Trial:
    """One request to an experiment: the arm that it got, for whom (`unit`: 16 bytes), and the id of its answer."""

    experiment: str
    arm: str
    unit: bytes
    id: str = ""
    phase: int = 0


def make_experiment(
    name: str, arms: Mapping[str, float], base: str, is_adapter: Callable[[str], bool], known: Callable[[str], bool]
) -> Experiment:
    """Raises: UsageError naming what is wrong: the alias, an arm that is not `known`, or a weight."""
    if not name.strip() or not name.isprintable() or len(name) > LONGEST or name.lstrip().startswith("{"):
        raise UsageError(f"an experiment cannot be called {name[:LONGEST]!r}", "Give a short name of letters.")
    if name == base:
        raise UsageError(f"{name!r} is the base's own name", "Choose another alias.")
    if not 0 < len(arms) <= MOST:
        raise UsageError(f"the experiment {name!r} has {len(arms)} arms", f"Give 1 to {MOST}: {{model: weight}}.")
    for arm, weight in arms.items():
        if not arm.isprintable() or not known(arm):
            said = f"the arm {arm[:LONGEST]!r} of {name!r} is no model here"
            raise UsageError(said, "Name adapters that are served (GET /v1/models), the base, or a mix of adapters.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1e9:
            raise UsageError(f"the arm {arm!r} of {name!r} has the weight {weight!r}", "Give a number of 0 or more.")
    if not any(arms.values()):
        raise UsageError(f"all arms of {name!r} have the weight 0", "Give one a positive weight.")
    if is_adapter(name) and name not in arms:
        said = f"{name!r} is an adapter, and none of the arms: who asks for it would get others"
        raise UsageError(said, "Choose another alias, or make the adapter an arm (of weight 0, if it is to rest).")
    return Experiment(name, {arm: float(weight) for arm, weight in arms.items()})


def unit_of(key: str, user: str | None) -> bytes:
    """Who stays with an arm: a `user` of one API key, or this one request where None. Names are not kept: a digest is.

    Returns 16 bytes.
    """
    if not user:
        return secrets.token_bytes(16)
    return blake2b(f"{key}\0{user}".encode("utf8", "surrogatepass"), digest_size=16).digest()


def draw(experiment: Experiment, unit: bytes) -> str:
    """The arm of a unit, each with its share of the weights.

    Weighted rendezvous hashing (Schindelhauer and Schomaker 2005, "Weighted Distributed Hash Tables"): every arm draws
    an exponential time of rate `weight` from a hash of unit and arm, and the earliest wins. So an arm whose weight
    grows takes units and gives none away: of two arms exactly the share that moved changes hands.
    """
    times = {arm: _time(experiment.name, arm, unit) / weight for arm, weight in experiment.arms.items() if weight > 0}
    return min(times, key=lambda arm: (times[arm], arm))


def _time(experiment: str, arm: str, unit: bytes) -> float:
    text = f"{experiment}\0{arm}\0".encode("utf8", "surrogatepass")
    number = int.from_bytes(blake2b(text + unit, digest_size=8).digest(), "big") >> 11  # 53 bits: a float holds them
    return -math.log((number + 0.5) / 2**53)
