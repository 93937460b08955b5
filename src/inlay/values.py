"""Settings are checked once, where they come in: every field against its declared type and range, by one mechanism.

A settings class is a frozen dataclass below `Checked`. A field's annotation says all there is to know of it:

    r: Annotated[Count, Help("rank of the product")] = 8

its type, its range (`annotated_types`), its names (`OneOf`), how people write it (`From`) and what it means (`Help`).
Flags, `--help`, `inlay methods` and error messages are made from that.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from inlay.errors import UsageError

__all__ = [
    "Checked",
    "Count",
    "Field",
    "From",
    "Help",
    "NonNegative",
    "OneOf",
    "Positive",
    "Seed",
    "Share",
    "checked",
    "fields_of",
]

EXACT = 2**53
"""Below it a float that is whole is that whole number and no other."""


@dataclass(frozen=True)
class Help:
    """What a field means, in words; `panel` heads it in `--help`; `flag` is its name there where it is another."""

    words: str
    panel: str = ""
    flag: str = ""


@dataclass(frozen=True)
class OneOf:
    """The names there are. `what` names the kind of thing ("method")."""

    names: Collection[str]
    what: str = ""


@dataclass(frozen=True)
class From:
    """Turns what people write (text of a flag, YAML's mapping) into the field's value before it is checked.

    It raises ValueError whose words say what to write instead.
    """

    convert: Callable[[Any], Any]


Count = Annotated[int, Ge(1), Le(2**31 - 1)]
Seed = Annotated[int, Ge(-(2**63)), Le(2**63 - 1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class Checked:
    """Base of settings: their fields are checked whenever one is made.

    Raises: UsageError naming the field, its value and what would be right.
    """

    def __post_init__(self) -> None:
        for field in fields_of(type(self)):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name), type(self)))


@dataclass(frozen=True)
class Field:
    """A field of a settings class: its bare type with the Nones taken out, what is annotated, its default."""

    name: str
    type: Any
    optional: bool
    marks: tuple[Any, ...]
    default: Any

    def mark(self, kind: type[Any]) -> Any:
        """The outermost of the annotations of one kind."""
        return next((mark for mark in reversed(self.marks) if isinstance(mark, kind)), None)

    @property
    def help(self) -> Help:
        return self.mark(Help) or Help("")

    @property
    def flag(self) -> str:
        return self.help.flag or "--" + self.name.rstrip("_").replace("_", "-")

    @property
    def is_text(self) -> bool:
        """Whether what is typed is the value itself, and nothing is read into it."""
        return self.type is str

    def expected(self, value: Any = None) -> str:
        """What a right value is, in words: "a whole number of 1 or more"; with the end that `value` is beyond."""
        if choices := self.mark(OneOf):
            return "one of " + ", ".join(choices.names)
        words = " or ".join(dict.fromkeys(_words(kind, self.marks, value) for kind in _members(self.type)))
        return words


@cache
def fields_of(kind: type[Any]) -> tuple[Field, ...]:
    """The fields of a settings class that its constructor takes."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple(_field(f, hints[f.name]) for f in dataclasses.fields(kind) if f.init)


def _field(field: dataclasses.Field[Any], hint: Any) -> Field:
    marks: list[Any] = []
    plain, optional = _unpacked(hint, marks)
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return Field(field.name, plain, optional, tuple(marks), default)


def _unpacked(hint: Any, marks: list[Any]) -> tuple[Any, bool]:
    """The type without None and without annotations at its top, which go into `marks`."""
    if typing.get_origin(hint) is Annotated:
        inner, *own = typing.get_args(hint)
        marks[:0] = own
        return _unpacked(inner, marks)
    members = _members(hint)
    if NoneType in members:
        rest = [member for member in members if member is not NoneType]
        plain, _ = _unpacked(rest[0], marks) if len(rest) == 1 else (typing.Union[tuple(rest)], True)  # noqa: UP007
        return plain, True
    return hint, False


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    return typing.get_args(hint) if union else (hint,)


def checked(field: Field, value: Any, owner: Any) -> Any:
    """`value` as the field's type has it. Raises: UsageError."""
    if value is None and field.optional:
        return None
    try:
        if convert := field.mark(From):
            value = convert.convert(value)
            if value is None and field.optional:
                return None
        value = _plain(value)
        _adapter(owner, field.name).validate_python(value)
        if choices := field.mark(OneOf):
            _check_choice(value, choices)
    except (ValueError, TypeError, OverflowError) as error:  # pydantic's own error is a ValueError
        raise _refused(field, value, owner, error) from None
    return float(value) if field.type is float else value


def _check_choice(value: Any, choices: OneOf) -> None:
    if value in choices.names:
        return
    close = difflib.get_close_matches(str(value), list(choices.names), n=1)
    raise ValueError(f"Did you mean {close[0]!r}? " if close else "")


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's own, whole floats as ints, sets as sorted lists."""
    if isinstance(value, Set):
        return sorted(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return int(value)
    return value


@cache
def _adapter(owner: Any, name: str) -> Any:
    """pydantic's check of one field; imported with the first value, which `--help` never has."""
    from pydantic import ConfigDict, TypeAdapter

    field = next(field for field in fields_of(owner) if field.name == name)
    ranges = tuple(mark for mark in field.marks if isinstance(mark, (Ge, Gt, Le, Lt)))
    hint: Any = Annotated[(field.type, *ranges)] if ranges else field.type  # pyright: ignore
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return TypeAdapter(hint, config=config)


def _refused(field: Field, value: Any, owner: Any, error: Exception) -> UsageError:
    title = getattr(owner, "title", "")
    named = f"{title}'s {field.name}" if title else field.name.rstrip("_")
    choices = field.mark(OneOf)
    what = f"{choices.what} {value!r} is not known" if choices and choices.what else f"{named} is {_short(value)}"
    said = str(error) if type(error) is ValueError else ""
    if field.mark(From) is not None and said:
        return UsageError(what, said)
    default = field.default
    usual = "" if default in (None, "", dataclasses.MISSING) or default == {} else f"; {_short(default)} is the default"
    return UsageError(what, f"{said}Choose {field.expected(value)}{usual}.")


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:77]}..."


# ---- types in words


def _words(kind: Any, marks: Sequence[Any], value: Any) -> str:
    bounds = " ".join(_bounds(marks, value))
    if kind is bool:
        return "true or false"
    if kind is int:
        return f"a whole number {bounds}".strip()
    if kind is float:
        return f"a number {bounds}".strip()
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is str:
        return "text"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping of {_plural(inner[0])} to {_plural(inner[1])}" if inner else "a mapping"
    if origin is not None and issubclass(origin, Sequence):
        return f"a list of {_plural(inner[0])}"
    return str(getattr(kind, "__name__", kind))


def _plural(kind: Any) -> str:
    bare = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    return {str: "names", int: "whole numbers", float: "numbers"}.get(bare, "values")


def _top(mark: Le | Lt) -> Any:
    return mark.le if isinstance(mark, Le) else mark.lt


def _bottom(mark: Ge | Gt) -> Any:
    return mark.ge if isinstance(mark, Ge) else mark.gt


def _bounds(marks: Sequence[Any], value: Any) -> Iterator[str]:
    low = max((m for m in marks if isinstance(m, (Ge, Gt))), key=_bottom, default=None)
    high = min((m for m in marks if isinstance(m, (Le, Lt))), key=_top, default=None)
    top, bottom = None if high is None else _top(high), None if low is None else _bottom(low)
    beyond = top is not None and abs(top) < 2**62 and isinstance(value, (int, float)) and value > top
    if low is not None and high is not None and (beyond or abs(top) < 2**31 - 1):  # pyright: ignore
        yield f"{'from' if isinstance(low, Ge) else 'above'} {bottom:g}"
        end = f"{top:,.0f}" if top == round(top) else f"{top:g}"  # pyright: ignore
        yield f"to {end}" if isinstance(high, Le) else f"to below {end}"
    elif low is not None and abs(bottom) < 2**31:  # pyright: ignore
        yield f"of {bottom:g} or more" if isinstance(low, Ge) else f"above {bottom:g}"
    elif high is not None:
        yield "of 64 bits"
