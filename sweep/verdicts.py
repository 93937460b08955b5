"""What became of one law, for one method, on one type: a cell of the matrix."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.errors import InlayError

__all__ = [
    "LATE", "RIGHT", "STATUSES", "WRONG", "BaseFails", "Cell", "Different", "Tolerance", "Untried", "Verdict", "apart",
    "of_error", "same", "verdict_of",
]  # fmt: skip

RIGHT, REFUSED, RAW, WRONG, BASE, UNTRIED = "right", "refused", "raw", "wrong", "base", "untried"
STATUSES = (WRONG, RAW, REFUSED, BASE, UNTRIED, RIGHT)
"""Worst first. `base`: the base breaks the law without Inlay; `untried`: the sweep has no case for it."""


LATE = "it took longer than the limit of a process"
"""The note on a law that a slow machine may not have ended."""


class Different(Exception):
    """A law does not hold: says by how much."""


class BaseFails(Exception):
    """The plain base breaks the law too: says what was seen."""


class Untried(Exception):
    """The law says nothing of this case: says why."""


@dataclass(frozen=True)
class Verdict:
    status: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One line of the file of finished cells."""

    use: str
    type_name: str
    method: str
    law: str
    status: str
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences: of outputs, and of gradients."""

    output: float = 1e-9
    gradient: float = 1e-7


def verdict_of(check: Callable[[], str | None]) -> Verdict:
    """Run one check; what it returns is a note on a cell that is right."""
    try:
        return Verdict(RIGHT, check() or "")
    except Exception as error:  # each is a verdict: the sweep goes on
        return of_error(error)


def of_error(error: BaseException) -> Verdict:
    text = " ".join(str(error).split())[:400]
    for kind, status in ((InlayError, REFUSED), (Different, WRONG), (BaseFails, BASE), (Untried, UNTRIED)):
        if isinstance(error, kind):
            return Verdict(status, text)
    return Verdict(RAW, f"{type(error).__name__}: {text} [{_where(error)}]")


def _where(error: BaseException) -> str:
    """The last line of Inlay, and the last one of all, that the error came through."""
    places, trace = [], error.__traceback__
    while trace is not None:
        file = re.sub(r"^.*/(site-packages|src)/", "", trace.tb_frame.f_code.co_filename)
        places.append(f"{file}:{trace.tb_lineno}")
        trace = trace.tb_next
    ours = [place for place in places if place.startswith("inlay/")]
    return " < ".join(dict.fromkeys([*places[-1:], *ours[-1:]]))


def apart(ours: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected number; infinite where one alone is not finite."""
    if ours.shape != expected.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    if not torch.equal(ours.isfinite(), expected.isfinite()):
        return float("inf")
    ours, expected = ours.detach(), expected.detach()
    difference = torch.where(expected.isfinite(), (ours - expected).abs(), 0.0)
    return float(difference.max()) / max(1e-6, float(torch.where(expected.isfinite(), expected.abs(), 0.0).max()))


def same(what: str, ours: Tensor, expected: Tensor, bound: float) -> None:
    """Raises: Different where two tensors are further apart than `bound`."""
    if (found := apart(ours, expected)) > bound:
        shapes = "" if ours.shape == expected.shape else f" (shapes {tuple(ours.shape)}, {tuple(expected.shape)})"
        raise Different(f"{what}: {found:.2g} apart{shapes}")
