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

    Raises: what transformers' `generate` does where a base cannot generate.
    """
    model: Any = bank.model
    adapter = None if name is None else bank.adapters[name]
    taken = 0 if adapter is None else adapter.virtual_length + adapter.prefix_length
    room = (positions_of(model) or MANY) - new - taken
    ids = torch.tensor([prompt.ids[: max(1, room)]] * rows, device=model.device)  # (rows, tokens)
    marks = [clock()]

    def mark(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        marks.append(clock())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    places = [min(prompt.virtual_at, ids.shape[1])] * rows
    with torch.no_grad(), bank.route([name] * rows, places=places):
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            num_beams=1, pad_token_id=0, stopping_criteria=[mark],
        )  # fmt: skip
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
