"""What a token of an answer takes: text is written under a route, and the clock is read after each of its tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from inlay.bank.bank import Bank
from inlay.data.encode import Example
from inlay.sites.positions import positions_of

from .generating import generate
from .requests import Request
from .sampling import Sampling

__all__ = ["AddedTime", "Clock", "added_time", "token_times"]

Clock = Callable[[], float]
PAIRS = 4
"""Answers with the adapter and without that are compared, fewer where that is slow; two before them do not count."""
FEWEST, MOST = 4, 8
"""Tokens of each of them."""
MANY = 2**20
"""Positions of a base that bounds none."""


@dataclass(frozen=True)
class AddedTime:
    """Seconds that a decoded token takes more with an adapter than without: the `median` of `pairs` differences, whose
    middle half lies within `quartiles`. `base` is the median of the tokens without."""

    median: float
    quartiles: tuple[float, float]
    base: float
    pairs: int


def token_times(
    bank: Bank, name: str | None, prompt: Example, new: int, rows: int = 1, clock: Clock = time.perf_counter
) -> list[float]:
    """Seconds (new,) that the tokens of an answer to so many equal `rows` take, by the adapter `name` (the base where
    it is None): the first one with the reading of the prompt, which is cut where the base has no positions for it.

    Raises: what `generate` does where a base cannot write.
    """
    model: Any = bank.model
    adapter = None if name is None else bank.adapters[name]
    taken = 0 if adapter is None else adapter.virtual_length + adapter.prefix_length
    room = (positions_of(model) or MANY) - new - taken
    ids = prompt.ids[: max(1, room)]
    sampling = Sampling(max_new_tokens=new, ignore_eos=True)
    # Scopes of their own: no row reads what another has read.
    asked = [Request(name, ids, sampling, min(prompt.virtual_at, len(ids)), scope=str(row)) for row in range(rows)]
    marks = [clock()]
    for written, token in enumerate(generate(bank, asked), 1):
        if token.error is not None:
            raise token.error
        if written % rows == 0:
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            marks.append(clock())
    return [later - earlier for earlier, later in pairwise(marks)]


def added_time(bank: Bank, name: str, prompt: Example, seconds: float, clock: Clock = time.perf_counter) -> AddedTime:
    """What the adapter `name` adds to each token of one row's answer behind the first, in pairs with the base's own, in
    about so many `seconds`.

    Raises: as `token_times`.
    """
    begun = clock()
    for route in (None, name):
        token_times(bank, route, prompt, 2, clock=clock)
    a_token = max((clock() - begun) / 4, 1e-9)
    new = max(FEWEST, min(MOST, int(seconds / a_token / (2 * PAIRS))))
    apart: list[float] = []
    plain: list[float] = []
    for number in range(PAIRS):
        if apart and clock() - begun > 2 * seconds:
            break
        order = (name, None) if number % 2 else (None, name)  # what slows the machine down meets both alike
        times = {route: token_times(bank, route, prompt, new, clock=clock)[1:] for route in order}
        plain += times[None]
        apart += [own - base for own, base in zip(times[name], times[None], strict=True)]
    low, _, high = statistics.quantiles(apart, n=4)
    return AddedTime(statistics.median(apart), (low, high), statistics.median(plain), len(apart))
