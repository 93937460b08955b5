"""What a field of a space may be: one of some values, a number of a range, or so many times another field."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from inlay.errors import UsageError
from inlay.values import Field, checked

__all__ = ["USUAL", "Choices", "Range", "Tie", "Varied", "holds", "is_number", "read_varied", "same", "takes"]

USUAL = "usual"
"""What `lr` may be so many times: the learning rate that the method begins with."""
FORMS = "Write a value, a list of values, {low: 1, high: 9}, {times: FIELD, by: 2}, {value: ...} or {choices: [...]}."
RANGE_KEYS = ("low", "high", "log", "step")
MOST_STEPS = 1000
DIGITS = 3
"""Of numbers drawn from a range: more would tell no two contenders apart, and fewer machines would agree on them."""

Conditions = Mapping[str, tuple[Any, ...]]
"""By field, the values of which it must have one."""


@dataclass(frozen=True)
class Choices:
    """One of some values; a constant is a choice of one."""

    values: tuple[Any, ...]
    when: Conditions = field(default_factory=dict)


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included, spread evenly over them or, with `log`, over their logarithms."""

    low: float
    high: float
    log: bool
    whole: bool
    when: Conditions = field(default_factory=dict)

    def at(self, share: float) -> float:
        """The number at a share of the range, from 0 to below 1."""
        high = self.high + self.whole  # each whole number has as much of the range as any other
        if self.log:
            value = self.low * math.exp(share * (math.log(high) - math.log(self.low)))
        else:
            value = self.low * (1 - share) + high * share
        value = math.floor(value) if self.whole else float(f"{value:.{DIGITS}g}")
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Tie:
    """`by` times the value of the field `of`; `USUAL` is the method's own learning rate."""

    of: str
    by: float
    when: Conditions = field(default_factory=dict)

    def times(self, value: Any) -> float:
        """The product without the noise of its last digits: 3 times 0.1 is 0.3."""
        return float(f"{self.by * value:.12g}")


Varied = Choices | Range | Tie


def read_varied(given: Any, own: Field, owner: type[Any]) -> Varied:
    """What a space says of the field `own` of the class `owner`; its `when` is read apart.

    Raises: UsageError naming the method, the field and the value.
    """
    if not isinstance(given, Mapping):
        return _choices(given if isinstance(given, list) else [given], own, owner)
    keys = [key for key in given if key != "when"]
    if "low" in keys or "high" in keys:
        _check_keys(given, RANGE_KEYS, own, owner)
        return _range(given, own, owner)
    if "times" in keys or "by" in keys:
        _check_keys(given, ("times", "by"), own, owner)
        return _tie(given, own, owner)
    if keys == ["value"]:
        return _choices([given["value"]], own, owner)
    if keys == ["choices"]:
        values = given["choices"]
        if not isinstance(values, list):
            raise UsageError(f"the choices of {named(own, owner)} are {values!r}", "Write a list: {choices: [1, 2]}.")
        return _choices(values, own, owner)
    raise UsageError(f"{named(own, owner)} is {short(given)}, which says no values", FORMS)


def named(own: Field, owner: type[Any]) -> str:
    """A field as people know it: "LoRA's r", "lr"."""
    title = getattr(owner, "title", "")
    return f"{title}'s {own.name}" if title else own.name


def short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:77]}..."


def _check_keys(given: Mapping[Any, Any], known: Sequence[str], own: Field, owner: type[Any]) -> None:
    for key in given:
        if key not in (*known, "when"):
            raise UsageError(f"{named(own, owner)} has the key {key!r}", f"Known there: {', '.join(known)}, when.")


def _choices(values: Sequence[Any], own: Field, owner: type[Any]) -> Choices:
    if not values:
        raise UsageError(f"{named(own, owner)} is an empty list", "Name its values, or leave the field out.")
    found: list[Any] = []
    for value in values:
        try:
            right = checked(own, value, owner)
        except RecursionError:  # a list that holds itself
            raise UsageError(f"{named(own, owner)} has a value that holds itself", FORMS) from None
        if any(same(right, other) for other in found):
            raise UsageError(f"{named(own, owner)} lists {short(value)} twice", "Name each value once.")
        found.append(right)
    return Choices(tuple(found))


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal; true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def takes(own: Field) -> tuple[bool, bool]:
    """Whether a field takes numbers, and whether whole ones alone."""
    union = typing.get_origin(own.type) in (typing.Union, UnionType)
    members = typing.get_args(own.type) if union else (own.type,)
    kinds = [typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind for kind in members]
    return int in kinds or float in kinds, float not in kinds


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _range(given: Mapping[str, Any], own: Field, owner: type[Any]) -> Range | Choices:
    name, (numeric, whole) = named(own, owner), takes(own)
    if not numeric:
        raise UsageError(f"{name} has a range, and takes no numbers", f"Write a list: it is {own.expected()}.")
    low, high = (_end(given, key, own, owner) for key in ("low", "high"))
    log, step = given.get("log", False), given.get("step")
    if not isinstance(log, bool):
        raise UsageError(f"{name} has log: {short(log)}", "Write true or false.")
    if low > high:
        raise UsageError(f"{name} has a range upside down, from {low:g} to {high:g}", "Swap low and high.")
    if low == high:
        raise UsageError(f"{name} has a range of one number, {low:g}", "Write the number alone.")
    if log and low <= 0:
        raise UsageError(f"{name} has a range by logarithms from {low:g}", "Begin it above 0, or leave log out.")
    if step is None:
        return Range(low, high, log, whole)
    if log:
        raise UsageError(f"{name} has both log and step", "Leave one of them out, or list the values.")
    return _stepped(low, high, step, own, owner)


def _end(given: Mapping[str, Any], key: str, own: Field, owner: type[Any]) -> Any:
    name = named(own, owner)
    if key not in given:
        raise UsageError(f"{name} has a range without {key}", "Give low and high.")
    if not is_number(given[key]):
        raise UsageError(f"{name} has {key}: {short(given[key])}, which is no number", "Give low and high as numbers.")
    return checked(own, given[key], owner)


def _stepped(low: float, high: float, step: Any, own: Field, owner: type[Any]) -> Choices:
    """A range with a step is the list of its numbers."""
    name = named(own, owner)
    if not is_number(step) or step <= 0:
        raise UsageError(f"{name} has step: {short(step)}", "Give a number above 0.")
    count = (high - low) / step + 1e-9
    if count >= MOST_STEPS:
        raise UsageError(f"{name} has more than {MOST_STEPS} steps", "Give a wider step, or leave it out.")
    if count < 1:
        raise UsageError(f"{name} has a step of {step:g}, wider than its range", "Give a smaller one.")
    return _choices([float(f"{low + n * step:.12g}") for n in range(int(count) + 1)], own, owner)


def _tie(given: Mapping[str, Any], own: Field, owner: type[Any]) -> Tie:
    name, of, by = named(own, owner), given.get("times"), given.get("by")
    if not isinstance(of, str) or not is_number(by):
        raise UsageError(f"{name} is {short(dict(given))}", "Write {times: FIELD, by: NUMBER}, as {times: r, by: 2}.")
    if of == own.name:
        raise UsageError(f"{name} is tied to itself", "Name another field.")
    if not takes(own)[0]:
        raise UsageError(f"{name} is tied to {of}, and takes no numbers", f"It is {own.expected()}.")
    if of == USUAL and own.name != "lr":
        what = f"{name} is tied to {USUAL}, the learning rate that the method begins with"
        raise UsageError(what, "Only lr can be so many times it.")
    return Tie(of, float(typing.cast(float, by)))


def holds(wanted: Sequence[Any], varied: Varied | None, default: Any) -> bool:
    """Whether a condition can hold: a field of `varied` values, or with the `default`, may have one of the `wanted`."""
    if isinstance(varied, Tie):
        return True
    if varied is not None and varied.when and any(same(value, default) for value in wanted):
        return True
    if isinstance(varied, Range):
        return any(is_number(value) and varied.low <= value <= varied.high for value in wanted)
    values = (default,) if varied is None else varied.values
    return any(same(one, other) for one in wanted for other in values)
