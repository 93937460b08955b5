"""What each setting of a race did: contenders grouped by its values, and pairs that are alike in all else."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inlay.evaluation.compare import Comparison
from inlay.evaluation.intervals import student_interval

from .race_entrants import Entrant, Race, rate_text, value_text
from .race_rows import paired
from .words import interval_text, score_text

__all__ = ["Effect", "Group", "Pair", "effects", "pairs"]

RATE = "lr"


@dataclass(frozen=True)
class Group:
    """The contenders of one `value`: how many they are, their mean on the choosing rows at the first rung, which all
    reach after the same share of their course, and the best of their final scores; texts."""

    value: str
    count: int
    first: str
    evidence: str
    best: str
    within: str


@dataclass(frozen=True)
class Effect:
    """A setting of a method (of all methods: the method itself) with its groups."""

    setting: str
    groups: Sequence[Group]


@dataclass(frozen=True)
class Pair:
    """Two contenders that are alike in all but one setting: `found` is the second one less the first, which have taken
    so many `steps`: a longer course is in the difference too."""

    setting: str
    change: str
    names: tuple[str, str]
    steps: tuple[int | None, int | None]
    found: Comparison


def effects(race: Race) -> list[Effect]:
    """The settings in which contenders differ: the method first, then those of each method that several try."""
    methods = _grouped(race.entrants, lambda own: own.title)
    found = [Effect("method", _groups(race, methods))] if len(methods) > 1 else []
    for title, entrants in methods.items():
        for names in _varied(entrants):
            values = _sorted(_grouped(entrants, lambda own, names=names: _value(own, names)))
            found.append(Effect(f"{title}: {_named(names)}", _groups(race, values)))
    return found


def pairs(race: Race) -> Iterator[Pair]:
    """Neighbours in one setting that share the method, the seed and all other settings, on the final rows. Each is
    compared when it is asked for."""
    for title, entrants in _grouped(race.entrants, lambda own: own.title).items():
        varied = _varied(entrants)
        for names in varied:
            rest = [name for others in varied if others != names for name in others]
            for one, other in _neighbours(entrants, names, rest):
                found = paired(other.rows, one.rows, race.metric)
                if found is not None:
                    change = f"{_value(one, names)} → {_value(other, names)}"
                    setting, steps = f"{title}: {_named(names)}", (one.steps, other.steps)
                    yield Pair(setting, change, (one.name, other.name), steps, found)


def _neighbours(
    entrants: Sequence[Entrant], names: Sequence[str], rest: Sequence[str]
) -> Iterator[tuple[Entrant, Entrant]]:
    """Those that come next to one another by the settings `names` and are equal in the `rest` and the seed."""
    alike = _grouped(entrants, lambda own: json.dumps([own.seed, _values(own, rest)], default=str))
    for members in alike.values():
        yield from itertools.pairwise(sorted(members, key=lambda own: _rank(_values(own, names)[0])))


# ---- groups


def _groups(race: Race, by_value: Mapping[str, Sequence[Entrant]]) -> list[Group]:
    return [_group(race, value, members) for value, members in by_value.items()]


def _group(race: Race, value: str, members: Sequence[Entrant]) -> Group:
    firsts = [own.first for own in members if own.first is not None]
    scored = [own for own in members if own.score is not None]
    best = (max if race.higher else min)(scored, key=lambda own: own.score or 0.0, default=None)
    mean = sum(firsts) / len(firsts) if firsts else None
    return Group(
        value, len(members), score_text(mean), _evidence(firsts), "–" if best is None else score_text(best.score),
        "" if best is None else interval_text(best.interval),
    )  # fmt: skip


def _evidence(values: Sequence[float]) -> str:
    """What a mean over so many contenders is worth."""
    if len(values) < 2:
        return "one contender" if values else ""
    if len(values) == 2:
        return f"two contenders: {score_text(min(values))} and {score_text(max(values))}"
    numbers = np.array(values, np.float64)
    low, high = student_interval(float(numbers.mean()), numbers - numbers.mean())
    return f"95 % interval {interval_text((low, high))}"


def _grouped(entrants: Sequence[Entrant], key: Any) -> dict[str, list[Entrant]]:
    found: dict[str, list[Entrant]] = {}
    for own in entrants:
        found.setdefault(key(own), []).append(own)
    return found


def _sorted(groups: Mapping[str, list[Entrant]]) -> dict[str, list[Entrant]]:
    return dict(sorted(groups.items(), key=lambda group: _rank(_as_number(group[0]))))


def _as_number(text: str) -> Any:
    try:
        return float(text.partition(" ")[0].rstrip(","))
    except ValueError:
        return text


# ---- settings


def _varied(entrants: Sequence[Entrant]) -> list[tuple[str, ...]]:
    """The settings in which contenders of a method differ; those that change together, as alpha with r, are one."""
    names = [RATE, *dict.fromkeys(name for own in entrants for name in own.settings)]
    found: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        values = [json.dumps(_values(own, [name]), default=str) for own in entrants]
        if len(set(values)) > 1:
            found.setdefault(tuple(values.index(value) for value in values), []).append(name)
    return [tuple(names) for names in found.values()]


def _values(own: Entrant, names: Sequence[str]) -> list[Any]:
    return [own.lr if name == RATE else own.settings.get(name) for name in names]


def _value(own: Entrant, names: Sequence[str]) -> str:
    return ", ".join(
        rate_text(value) if name == RATE else value_text(value)
        for name, value in zip(names, _values(own, names), strict=True)
    )


def _named(names: Sequence[str]) -> str:
    return ", ".join("learning rate" if name == RATE else name for name in names)


def _rank(value: Any) -> tuple[int, float, str]:
    """Numbers first, by size."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return 0, float(value), ""
    return 1, 0.0, value_text(value)
