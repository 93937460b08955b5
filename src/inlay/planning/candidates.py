"""What is compared: every method with its usual settings, and some sizes of those that have one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from inlay.errors import InlayError
from inlay.methods.contract import Method
from inlay.methods.table import GROUPS, METHODS
from inlay.runs.settings import make_method
from inlay.values import fields_of

__all__ = ["Candidate", "candidates"]

SIZES = {"r": "r", "num_virtual_tokens": "tokens", "reduction_factor": "reduction"}
"""Settings that say how large an adapter is, and the words for them."""
TIMES = (0.5, 2, 4)
"""Sizes that are compared beside the usual one, as multiples of it."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """The table's `method` of a `group`, with those of its settings that are not usual in `set`; `size` in words."""

    method: str
    group: str
    set: Mapping[str, Any] = field(default_factory=dict)
    size: str = ""

    @property
    def label(self) -> str:
        return f"{self.method} {self.size}".strip()

    def make(self) -> Method:
        """Raises: UsageError where the method has settings that only a user can say."""
        return make_method(self.method, self.set)


def candidates(only: tuple[str, ...] = ()) -> list[Candidate]:
    """The usual ones first, the first of each group before any second; then the other sizes. `only` are methods that
    are wanted, all where it is empty."""
    turns = zip_longest(*([(name, group) for name in own] for group, own in GROUPS.items()))
    names = [one for turn in turns for one in turn if one is not None and (not only or one[0] in only)]
    usual = [Candidate(name, group, size=_usual(name)) for name, group in names]
    return [*usual, *(other for name, group in names for other in _others(name, group))]


def _size_of(name: str) -> tuple[str, int] | None:
    """The setting that says the size of the method `name`, with its default."""
    found = {f.name: f.default for f in fields_of(METHODS[name])}
    whole = {own: value for own in SIZES if isinstance(value := found.get(own), int) and value > 0}
    return next(iter(whole.items()), None)


def _usual(name: str) -> str:
    size = _size_of(name)
    return "" if size is None else f"{SIZES[size[0]]} {size[1]}"


def _others(name: str, group: str) -> Iterator[Candidate]:
    size = _size_of(name)
    if size is None:
        return
    for times in TIMES:
        value = int(size[1] * times)
        if value < 1:
            continue
        candidate = Candidate(name, group, {size[0]: value}, f"{SIZES[size[0]]} {value}")
        try:
            candidate.make()
        except InlayError:  # beyond what the method takes
            continue
        yield candidate
