"""An entry of a space: a method, and what each of its fields and of its course may be."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from inlay.errors import UsageError
from inlay.methods.table import METHODS
from inlay.runs.settings import make_method
from inlay.training.plan import Course
from inlay.values import Field, checked, fields_of

from .varied import USUAL, Choices, Range, Tie, Varied, holds, read_varied, same, takes

__all__ = ["COURSE_FIELDS", "NOT_HERE", "Chosen", "Entry", "check_course", "read_entry"]

COURSE_FIELDS: Mapping[str, Field] = {field.name: field for field in fields_of(Course)}
NOT_HERE = {
    "steps": "All contenders train as long as --budget, --epochs or --steps says: leave it out.",
    "epochs": "All contenders train as long as --budget, --epochs or --steps says: leave it out.",
    "seed": "--seeds K trains each contender by K seeds: leave it out.",
}
"""Fields of the course that are the race's own."""

Chosen = dict[str, Any]
"""The values of fields, those of the method and of the course together."""


@dataclass(frozen=True)
class Entry:
    """A method with its `fields`, each behind those it depends on, `lr` always among them. `where` says which entry it
    is, for messages. It takes part with fewer training rows than `rows_below`, or with any number where that is None.
    """

    where: str
    method: str
    fields: Mapping[str, Varied]
    rows_below: int | None = None

    @cached_property
    def own(self) -> Mapping[str, Field]:
        """The fields that the method has."""
        return {field.name: field for field in fields_of(METHODS[self.method])}

    @property
    def endless(self) -> bool:
        """Whether a field has a range, whose values are not counted."""
        return any(isinstance(varied, Range) for varied in self.fields.values())

    @property
    def dimensions(self) -> list[str]:
        """The fields that have more than one value."""
        return [name for name, v in self.fields.items() if isinstance(v, Range) or _several(v)]

    def split(self, chosen: Chosen) -> tuple[Chosen, Chosen]:
        """The settings of the method, and the fields of the course."""
        own = {name: value for name, value in chosen.items() if name in self.own}
        return own, {name: value for name, value in chosen.items() if name not in own}

    def grid(self) -> Iterator[Chosen]:
        """All there are, as nested loops: the field that is written first is the outermost."""

        def walk(names: list[str], chosen: Chosen) -> Iterator[Chosen]:
            if not names:
                yield chosen
                return
            varied = self.fields[names[0]]
            several = varied.values if isinstance(varied, Choices) else (None,)
            for value in several if self._active(varied, chosen) else (None,):
                yield from walk(names[1:], self._with(names[0], chosen, value))

        return walk(list(self.fields), {})

    def at(self, shares: Mapping[str, float]) -> Chosen:
        """The one at a point of the unit cube, whose axes are the `dimensions`."""
        chosen: Chosen = {}
        for name, varied in self.fields.items():
            chosen = self._with(name, chosen, _at(varied, shares.get(name, 0.0)))
        return chosen

    def _with(self, name: str, chosen: Chosen, value: Any) -> Chosen:
        """`chosen` with the value of one more field, where its conditions hold; a tie's follows from the others."""
        varied = self.fields[name]
        if not self._active(varied, chosen):
            return {**chosen, name: self._usual_rate(chosen)} if name == "lr" else chosen
        return {**chosen, name: self._tied(name, varied, chosen) if isinstance(varied, Tie) else value}

    def _active(self, varied: Varied, chosen: Chosen) -> bool:
        return all(
            any(same(self._value(name, chosen), value) for value in wanted) for name, wanted in varied.when.items()
        )

    def _value(self, name: str, chosen: Chosen) -> Any:
        """What a field is: its default where it has not been chosen."""
        return chosen[name] if name in chosen else (self.own.get(name) or COURSE_FIELDS[name]).default

    def _tied(self, name: str, tie: Tie, chosen: Chosen) -> Any:
        value = self._usual_rate(chosen) if tie.of == USUAL else self._value(tie.of, chosen)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(
                f"{name} is {tie.by:g} times {tie.of}, which is {value!r} there", f"Give {tie.of} a number."
            )
        field, owner = _field(self.method, name)
        return checked(field, tie.times(value), owner)

    def _usual_rate(self, chosen: Chosen) -> float:
        return make_method(self.method, self.split(chosen)[0]).usual_rate


def _several(varied: Varied) -> bool:
    return isinstance(varied, Choices) and len(varied.values) > 1


def _at(varied: Varied, share: float) -> Any:
    """The value at a share of what there is, from 0 to below 1; None for a tie."""
    if isinstance(varied, Choices):
        return varied.values[int(share * len(varied.values))]
    return varied.at(share) if isinstance(varied, Range) else None


def _field(method: str, name: str) -> tuple[Field, type[Any]]:
    own = next((field for field in fields_of(METHODS[method]) if field.name == name), None)
    return (own, METHODS[method]) if own else (COURSE_FIELDS[name], Course)


# ---- reading


def read_entry(where: str, method: str, given: Mapping[str, Any], rows_below: int | None) -> Entry:
    """The entry of `method` whose fields are `given`. Raises: UsageError."""
    fields: dict[str, Varied] = {}
    for name, value in given.items():
        _check_known(method, name)
        fields[name] = read_varied(value, *_field(method, name))
    for name, value in given.items():
        if isinstance(value, Mapping) and "when" in value:
            fields[name] = dataclasses.replace(fields[name], when=_conditions(method, name, value["when"], fields))
        _check_tie(method, name, fields[name])
    fields.setdefault("lr", Tie(USUAL, 1.0))
    return Entry(where, method, _ordered(method, fields), rows_below)


def check_course(given: Mapping[Any, Any]) -> None:
    """Raises: UsageError where a field that all entries share is none of the course."""
    for name in given:
        if name not in COURSE_FIELDS:
            raise UsageError(f"course has no field {name!r}", f"Fields: {', '.join(COURSE_FIELDS)}.")
        _check_ours(name)


def _check_known(method: str, name: Any) -> None:
    own = [field.name for field in fields_of(METHODS[method])]
    if name not in own and name not in COURSE_FIELDS:
        close = difflib.get_close_matches(str(name), [*own, *COURSE_FIELDS], n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        course = ", ".join(field for field in COURSE_FIELDS if field not in NOT_HERE)
        what = f"{method} has no setting {name!r}, and neither has a course of training"
        raise UsageError(what, f"{hint}Settings: {', '.join(own)}. Of the course: {course}.")
    if name not in own:
        _check_ours(name)


def _check_ours(name: str) -> None:
    if name in NOT_HERE:
        raise UsageError(f"a space cannot say {name}", NOT_HERE[name])


def _conditions(method: str, name: str, given: Any, fields: Mapping[str, Varied]) -> dict[str, tuple[Any, ...]]:
    if not isinstance(given, Mapping) or not given:
        raise UsageError(f"the condition of {name} is {given!r}", "Write when: {FIELD: value}, or a list of values.")
    found: dict[str, tuple[Any, ...]] = {}
    for other, values in given.items():
        if other not in fields:
            what = f"the condition of {name} names {other!r}, which is not there"
            raise UsageError(what, f"Fields of that entry: {', '.join(fields)}.")
        field, owner = _field(method, other)
        wanted = tuple(checked(field, value, owner) for value in (values if isinstance(values, list) else [values]))
        if not holds(wanted, fields[other], field.default):
            raise UsageError(f"the condition of {name} never holds: {other} is never {values!r}", "Mend one of them.")
        found[other] = wanted
    return found


def _check_tie(method: str, name: str, varied: Varied) -> None:
    if not isinstance(varied, Tie) or varied.of == USUAL:
        return
    what = f"{name} is tied to {varied.of!r}, which"
    own = [field.name for field in fields_of(METHODS[method])]
    if varied.of not in own and varied.of not in COURSE_FIELDS:
        raise UsageError(f"{what} is no field of {method}", f"Fields: {', '.join([*own, *COURSE_FIELDS])}.")
    if not takes(_field(method, varied.of)[0])[0]:
        raise UsageError(f"{what} is no number", "Name another field.")


def _ordered(method: str, fields: Mapping[str, Varied]) -> dict[str, Varied]:
    """Each field behind those it depends on, else as they are written. Raises: UsageError where there is a circle."""
    own = {field.name for field in fields_of(METHODS[method])}
    waits: dict[str, set[str]] = {}
    for name, varied in fields.items():
        waits[name] = set(varied.when) | ({varied.of} & {*fields} if isinstance(varied, Tie) else set())
        if name == "lr" and (varied.when or (isinstance(varied, Tie) and varied.of == USUAL)):
            waits[name] |= own & {*fields}  # the usual rate depends on the method's settings
    found: dict[str, Varied] = {}
    while len(found) < len(fields):
        name = next((name for name in fields if name not in found and waits[name] <= {*found}), None)
        if name is None:
            circle = ", ".join(_circle({name: waits[name] for name in fields if name not in found}))
            raise UsageError(f"the fields {circle} wait for one another", "Drop a tie or a condition.")
        found[name] = fields[name]
    return found


def _circle(waits: dict[str, set[str]]) -> list[str]:
    """Those that wait, without the ones that nobody waits for."""
    while free := [name for name in waits if not any(name in others for others in waits.values())]:
        waits = {name: others for name, others in waits.items() if name not in free}
    return [*waits]
