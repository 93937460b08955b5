"""The contenders of a race: which of a space take part, in which order, by what names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from inlay.errors import UsageError
from inlay.methods.table import METHODS
from inlay.runs.settings import check_place, make_method
from inlay.training.plan import Course, Plan
from inlay.values import fields_of

from .entries import COURSE_FIELDS, NOT_HERE, Chosen, Entry
from .sampling import sampled_points
from .space import LEAST, Space, check_count

__all__ = ["Contender", "contenders"]

USUAL_COUNT, WHOLE = 16, 48
"""How many contenders there are where nobody says it: the whole grid where it is no more than `WHOLE`."""
PATIENCE = 200
"""Points in a row that bring nothing new: then a space is taken to hold no more."""
NAME_LENGTH, PART_LENGTH = 64, 24
SHOWN = ("r", "num_virtual_tokens", "targets", "reduction_factor")
"""Settings that say how much is trained and where: they are shown where they are the defaults too."""
IN_LINE = {"num_virtual_tokens": "{} tokens", "targets": "{}", "prefix_projection": "network", "use_rslora": "rslora",
           "virtual_tokens_at": "{}"}  # fmt: skip
IN_NAME = {
    "num_virtual_tokens": "{}", "targets": "{}", "init": "{}", "alpha": "a{}", "dropout": "drop{}",
    "prefix_projection": "network", "use_rslora": "rslora", "loraplus_lr_ratio": "plus{}",
    "virtual_tokens_at": "{}",
}  # fmt: skip
"""Shorter words than the setting's name and its value; those without braces are of switches that are on."""
NAMED_ALWAYS = ("r", "num_virtual_tokens")


@dataclass(frozen=True)
class Contender:
    """One that races: its `name` is unique in the race and names a folder; `method` is the table's; `set` holds those
    of the method's settings that are not the defaults, `course` fields of `training.plan.Course`: lr always, seed where
    there are several. `twin` is what those share that differ in the seed alone, "" where there is one seed.
    """

    name: str
    method: str
    set: Mapping[str, Any] = field(default_factory=dict)
    course: Mapping[str, Any] = field(default_factory=dict)
    twin: str = ""

    def line(self) -> str:
        """One line for people: "LoRA r=8 all-linear lr 1e-3"."""
        words = [_in_line(name, value) for name, value in self._shown(SHOWN)]
        course = [IN_LINE.get(name, name + " {}").format(_words(value)) for name, value in _unusual(self.course)]
        seed = [f"seed {self.course['seed']}"] if self.twin else []
        return " ".join([METHODS[self.method].title, *words, *course, f"lr {_rate(self.course['lr'])}", *seed])

    def plan(self, steps: int, shared: Mapping[str, Any] | None = None) -> Plan:
        """Its plan for so many steps; `shared` are fields of the course that it does not say itself. A place of virtual
        tokens is shared by those that have some.

        Raises: UsageError naming what is wrong.
        """
        method = make_method(self.method, self.set)
        course = {**(shared or {}), **self.course, "steps": steps}
        if not method.virtual_length:
            course.pop("virtual_tokens_at", None)
        return Plan(self.name, method, **course)

    def _shown(self, always: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """The settings that are shown `always`, where they say something, and those that tell it from others."""
        for own in sorted(fields_of(METHODS[self.method]), key=lambda own: own.name not in SHOWN):
            if own.name in self.set or (own.name in always and own.default not in (None, 0)):
                yield own.name, self.set.get(own.name, own.default)


def contenders(space: Space, count: int | None, *, seed: int, rows: int, seeds: int = 1) -> list[Contender]:
    """`count` contenders of a space (None: as many as it says), or as many as it holds where they are fewer; each as
    often as there are `seeds`, twins side by side. `rows` is the number of training rows.

    Equal arguments give equal contenders, on any machine; no two are the same.

    Raises: UsageError where there are fewer than two, or one cannot be made; InlayError where Optuna is missing.
    """
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise UsageError(f"seeds is {seeds!r}", "Give a whole number of 1 or more.")
    last = Course(seed=seed + seeds - 1).seed
    entries = [entry for entry in space.entries if entry.rows_below is None or rows < entry.rows_below]
    if count is not None:
        check_count(count)
    found = _chosen(space, entries, space.count if count is None else count, seed)
    if len(found) < LEAST:
        what = f"the space {space.name} holds {len(found) or 'no'} contender{'' if len(found) == 1 else 's'}"
        raise UsageError(f"{what} for {rows:,} training rows", "A race needs two: add entries or values.")
    named = _with_names(found)
    if seeds == 1:
        return named
    by_seed = [(one, number) for one in named for number in range(seed, last + 1)]
    return [
        replace(one, name=f"{one.name}-s{number}", course={**one.course, "seed": number}, twin=one.name)
        for one, number in by_seed
    ]


# ---- which


def _chosen(space: Space, entries: Sequence[Entry], count: int | None, seed: int) -> list[Contender]:
    endless = any(entry.endless for entry in entries)
    if not endless:
        grid = _distinct(one for entry in entries for one in _made(space, entry, entry.grid()))
        whole = list(islice(grid, (WHOLE if count is None else count) + 1))
        if count is None:
            count = len(whole) if len(whole) <= WHOLE else USUAL_COUNT
        if space.first or len(whole) <= count:
            return whole[:count]
    count = USUAL_COUNT if count is None else count
    shares = _shares([None if entry.endless else _size(space, entry, count) for entry in entries], count)
    streams: list[Iterator[Contender]] = []
    for number, (entry, share) in enumerate(zip(entries, shares, strict=True)):
        whole_grid = share is None or not entry.dimensions
        streams.append(_made(space, entry, entry.grid() if whole_grid else _sampled(entry, f"{seed}/{number}")))
    return list(islice(_distinct(_in_turn(streams)), count))


def _size(space: Space, entry: Entry, count: int) -> int:
    """How many an entry without ranges holds; `count` + 1 stands for all that is more."""
    return sum(1 for _ in islice(_made(space, entry, entry.grid()), count + 1))


def _shares(sizes: Sequence[int | None], count: int) -> list[int | None]:
    """How many contenders each entry has where they take turns; None for those that are had whole."""
    shares = [0] * len(sizes)
    while sum(shares) < count:
        for n in [n for n, size in enumerate(sizes) if size is None or shares[n] < size][: count - sum(shares)]:
            shares[n] += 1
    return [None if share == size else share for share, size in zip(shares, sizes, strict=True)]


def _sampled(entry: Entry, seed: str) -> Iterator[Chosen]:
    """Values at points that lie far from one another, each once; those of a grid that no point met come last."""
    seen: set[str] = set()
    idle = 0
    for point in sampled_points(entry.dimensions, seed):
        chosen = entry.at(point)
        if (key := _key(chosen)) not in seen:
            idle = 0
            seen.add(key)
            yield chosen
        elif (idle := idle + 1) >= PATIENCE:
            break
    if not entry.endless:
        yield from entry.grid()


def _in_turn(streams: Sequence[Iterator[Contender]]) -> Iterator[Contender]:
    left = [*streams]
    while left:
        for stream in [*left]:
            try:
                yield next(stream)
            except StopIteration:
                left.remove(stream)


def _made(space: Space, entry: Entry, values: Iterator[Chosen]) -> Iterator[Contender]:
    """Contenders without names. Raises: UsageError naming the space and the entry."""
    try:
        for chosen in values:
            settings, course = entry.split(chosen)
            method = make_method(entry.method, settings)
            check_place(method, Plan(entry.method, method, **course).virtual_tokens_at)
            own = {name: getattr(method, name) for name in settings if getattr(method, name) != entry.own[name].default}
            yield Contender("", entry.method, own, course)
    except UsageError as error:
        raise UsageError(f"{space.name}: {entry.where}: {error.what}", error.remedy) from None


def _distinct(found: Iterator[Contender]) -> Iterator[Contender]:
    seen: set[str] = set()
    for one in found:
        if (key := _key([one.method, one.set, one.course])) not in seen:
            seen.add(key)
            yield one


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


# ---- names


def _with_names(found: Sequence[Contender]) -> list[Contender]:
    """Each with a name of its own, on file systems too that do not know A from a."""
    taken: set[str] = set()
    named: list[Contender] = []
    for one in found:
        whole = _name(one)
        name = next(name for n in range(1, len(found) + 1) if (name := _numbered(whole, n)).lower() not in taken)
        taken.add(name.lower())
        named.append(replace(one, name=name))
    return named


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _name(one: Contender) -> str:
    parts = [_in_name(name, value) for name, value in one._shown(NAMED_ALWAYS)]
    course = {
        name: value for name, value in one.course.items() if name != "lr" and value != COURSE_FIELDS[name].default
    }
    parts += [_in_name(name, value) for name, value in course.items()]
    rate = _rate(one.course["lr"])
    front = "-".join([one.method, *filter(None, parts)])[: NAME_LENGTH - len(rate) - 1].rstrip("-.")
    return f"{front}-{rate}"


def _unusual(course: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields of a course that are not the defaults, but for those that are told apart or are the race's own."""
    for name, value in course.items():
        if name != "lr" and name not in NOT_HERE and value != COURSE_FIELDS[name].default:
            yield name, value


def _in_line(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return IN_LINE.get(name, name) if value else f"no {name}"
    return IN_LINE.get(name, name + "={}").format(_words(value))


def _in_name(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return _slug(IN_NAME.get(name, name) if value else f"no-{name}")
    return _slug(IN_NAME.get(name, name + "{}").format(_words(value)))


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return str(value)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-.")[:PART_LENGTH].rstrip("-.")


def _rate(rate: float) -> str:
    """1e-3, 3.5e-4."""
    digits, _, power = f"{rate:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
