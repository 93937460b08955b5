"""A space: which contenders a race may have.

    contenders: 24                                   # how many take part; --contenders says it too
    course: {warmup: 0.1}                            # fields of the course of training that all entries share
    entries:
      - method: lora                                 # or a list of methods
        r: [4, 8, 16, 32]                            # one of these
        alpha: {times: r, by: 2}                     # tied to another field
        targets: [all-linear, mlp, [q_proj, v_proj]] # a value that is a list stands in a list
        lr: {low: 1.0e-4, high: 1.0e-2, log: true}   # a range; step makes it a list
        dropout: {choices: [0.05, 0.1], when: {r: [16, 32]}}   # varied only there, the default elsewhere
      - method: prefix
        num_virtual_tokens: [10, 20]
        lr: {times: usual, by: 3}                    # times the rate that the method begins with, as it is where unset
      - method: prompt
        virtual_tokens_at: [start, before-answer]    # or after-system; --virtual-tokens-at says it for the others
      - method: lora
        rows_below: 1000                             # takes part where there are fewer training rows
        dropout: 0.1

Where all entries are lists and all that they hold is no more than the count, the race is the whole grid: entries as
they are written, in each of them the first field outermost. Else entries take turns, and each that holds more than its
share is sampled (`sampling`). `take: first` takes the first ones of the grid instead.

The named spaces are beginnings of one list, spaces/wide.yaml, which says from what its order comes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inlay.errors import UsageError
from inlay.methods.table import METHODS

from .entries import Entry, check_course, read_entry
from .space_files import NAMED, read_file

__all__ = ["LEAST", "MOST", "Space", "check_count", "read_space"]

KEYS = ("contenders", "take", "course", "entries")
TAKES = ("first", "spread")
LEAST, MOST = 2, 1000
"""Contenders of a race: fewer are none, and more are a slip of the pen."""


@dataclass(frozen=True)
class Space:
    """Entries, in order; `count` is how many contenders it says; `first` takes them as they are written."""

    name: str
    entries: tuple[Entry, ...]
    count: int | None = None
    first: bool = False


def read_space(name: str) -> Space:
    """The space called `name` (quick, default, wide), or that of the .yaml file there.

    Raises: UsageError naming the file, the entry, the field and what would be right.
    """
    held = read_file(name)
    try:
        space = _space(name, held)
    except UsageError as error:
        raise UsageError(f"{name}: {error.what}", error.remedy) from None
    return Space(name, space.entries, NAMED.get(name, space.count), space.first)


def check_count(count: Any) -> int:
    """Raises: UsageError where so many contenders are no race."""
    if not isinstance(count, int) or isinstance(count, bool):
        raise UsageError(f"contenders is {count!r}", f"Give a whole number from {LEAST} to {MOST:,}.")
    if count < LEAST:
        raise UsageError(f"a race of {count} contender{'' if count == 1 else 's'} is none", "Give 2 or more.")
    if count > MOST:
        raise UsageError(f"a race of {count:,} contenders is too much", f"Give {MOST:,} or fewer.")
    return count


def _space(name: str, held: Mapping[str, Any]) -> Space:
    for key in held:
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise UsageError(f"the key {key!r} is not known", f"{hint}Keys: {', '.join(KEYS)}.")
    count = None if held.get("contenders") is None else check_count(held["contenders"])
    take, course, listed = held.get("take", "spread"), held.get("course") or {}, held.get("entries")
    if take not in TAKES:
        raise UsageError(f"take is {take!r}", f"Write {' or '.join(TAKES)}.")
    if not isinstance(course, Mapping):
        raise UsageError(f"course is {course!r}, which is no mapping", "Write course: {batch_size: 16}.")
    check_course(course)
    if not listed:
        raise UsageError("the space is empty", "Give entries: a list, each with a method.")
    if not isinstance(listed, list):
        raise UsageError("entries is no list", "Begin each entry with `- method: NAME`.")
    entries = tuple(entry for n, given in enumerate(listed, 1) for entry in _entries(f"entry {n}", given, course))
    if take == "first" and (ranged := next((entry for entry in entries if entry.endless), None)):
        raise UsageError(f"{ranged.where} has a range, which has no first values", "List them, or leave take out.")
    return Space(name, entries, count, take == "first")


def _entries(where: str, given: Any, course: Mapping[str, Any]) -> Iterator[Entry]:
    """What one item of the list says, which may be of several methods."""
    if not isinstance(given, Mapping):
        raise UsageError(f"{where} is {given!r}, which is no mapping", "Begin it with `method: NAME`.")
    if "method" not in given:
        raise UsageError(f"{where} names no method", "Begin it with `method: NAME`; see `inlay methods`.")
    methods, below = given["method"], given.get("rows_below")
    if below is not None and (not isinstance(below, int) or isinstance(below, bool) or below < 1):
        raise UsageError(f"{where} has rows_below: {below!r}", "Give a whole number of rows, 1 or more.")
    fields = {**course, **{name: value for name, value in given.items() if name not in ("method", "rows_below")}}
    for method in methods if isinstance(methods, list) and methods else [methods]:
        if not isinstance(method, str) or method not in METHODS:
            close = difflib.get_close_matches(str(method), list(METHODS), n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise UsageError(f"{where}: no method is called {method!r}", f"{hint}Methods: {', '.join(METHODS)}.")
        try:
            yield read_entry(f"{where} ({method})", method, fields, below)
        except UsageError as error:
            raise UsageError(f"{where}: {error.what}", error.remedy) from None
