"""The laws by name, each a function of a case and names of methods, and the one that runs some of them on a type."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import inlay

from .bases import Base, NotBuilt
from .case import Case, Checks
from .laws_base import attach, merge
from .laws_memory import checkpointing, dtypes
from .laws_peft import from_peft, reload, to_peft
from .laws_rows import images, mixed, nan, packed
from .laws_text import decode, generate
from .samples import add
from .verdicts import Cell, Verdict, of_error

__all__ = ["LAWS", "cells_of"]

LAWS: dict[str, Callable[[Case, Sequence[str]], Checks]] = {
    "attach": attach,
    "mixed": mixed,
    "nan": nan,
    "media": images,
    "packed": packed,
    "to peft": to_peft,
    "from peft": from_peft,
    "reload": reload,
    "merge": merge,
    "generate": generate,
    "decode": decode,
    "recompute": checkpointing,
    "dtypes": dtypes,
}


def cells_of(
    use: str, type_name: str, methods: Sequence[str], laws: Sequence[str], begins: Callable[[str], object] = str,
    device: str = "cpu",
) -> Iterator[Cell]:  # fmt: skip
    """Every law and method on one type, as they are done. A type that is not built is one cell, of the law "build"."""
    start = time.monotonic()
    try:
        case = Case(Base(use, type_name, device))
    except NotBuilt as error:
        yield Cell(use, type_name, "", "build", "untried", str(error), time.monotonic() - start)
        return
    yield Cell(use, type_name, "", "build", "right", str(case.base.dtype), time.monotonic() - start)
    begins("add")
    start = time.monotonic()
    usable, refused = _addable(case, methods)
    case.usable = usable
    for name, verdict in refused.items():
        yield Cell(use, type_name, name, "add", verdict.status, verdict.note, time.monotonic() - start)
    for law in laws if usable else []:
        begins(law)
        start = time.monotonic()
        try:
            found = LAWS[law](case, usable)
        except Exception as error:
            found = dict.fromkeys(usable, of_error(error))
        seconds = (time.monotonic() - start) / max(1, len(found))
        for name, verdict in found.items():
            yield Cell(use, type_name, name, law, verdict.status, verdict.note, round(seconds, 3))


def _addable(case: Case, methods: Sequence[str]) -> tuple[list[str], dict[str, Verdict]]:
    """Methods that the base has a place for, and what the others say."""
    usable, refused = [], {}
    try:
        bank = inlay.attach(case.base.make())
    except Exception as error:
        return [], dict.fromkeys(methods, of_error(error))
    for name in methods:
        try:
            add(bank, name)
            usable.append(name)
        except Exception as error:
            refused[name] = of_error(error)
    return usable, refused
