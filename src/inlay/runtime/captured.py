"""Steps of rows that write, captured on a GPU: all kernels of a step start with one call, and the Python between them,
which takes many times as long as they do, does not run.

A step is captured for a number of rows and of blocks, not for certain rows: rows of any adapters whose products stand
in tables go through it, each with the numbers of its own. Others' steps are captured for the rows that write together.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inlay.bank.bank import Bank
from inlay.bank.going import Flight
from inlay.bank.hooks import hooked
from inlay.bank.ready import hooked_everywhere
from inlay.bank.standing import Standing
from inlay.batch.paged import Going
from inlay.batch.past import Past, Store
from inlay.batch.step_numbers import StepNumbers
from inlay.errors import UsageError
from inlay.kernels.picked import Picked, picks

from .companies import Companies, Company, up_to
from .recording import near, record
from .running import Running

__all__ = ["Captured", "Forward"]

log = logging.getLogger(__name__)

Forward = Callable[[Flight, Tensor], Tensor]
"""One step of a flight whose rows have the new tokens (1, rows): the logits (rows, vocabulary)."""

MOST = 64
"""Captured steps that are kept; the one that was used longest ago goes first."""
FEW = 8
"""Rows for which one captured step does, however few they are."""
PATIENCE = 3
"""Steps that rows have written together before theirs is captured for them alone."""
FAILURES = 3
"""Steps that could not be captured, one behind the other, before no more are tried."""

TABLES, ROWS = "tables", "rows"
"""Kinds of captured steps: for a company, or for certain rows."""
Values = dict[Any, Any]
Key = tuple[Any, ...]
"""Of a captured step: its kind, whose it is, its slots in a table, rows, blocks, and whether any row has a prefix."""


@dataclass(eq=False)
class _Step:
    """A captured step. `slots` (tables, rows, units) are what its rows have in the tables of its `company`, whose
    products are `picked`; a step that was captured for certain rows alone has none. `told` are the rows whose slots
    these are; `holds` is what its kernels read beside the tables."""

    numbers: StepNumbers
    logits: Tensor
    company: Company | None
    picked: list[Picked]
    slots: Tensor
    holds: Any
    replay: Callable[[], None] = lambda: None
    told: tuple[Running, ...] = ()

    def stands(self) -> bool:
        """Whether its tables are those that adapters come into; they may have grown."""
        tables = [] if self.company is None else self.company.tables
        return all(table.holds(picked) for table, picked in zip(tables, self.picked, strict=True))


class Captured:
    """The captured steps of one decoder; none where it is not `on`, as on a CPU. What others hook onto the base's
    modules after a step was captured does not run in it; where something is hooked on before, nothing is captured."""

    def __init__(self, bank: Bank, store: Store, companies: Companies, forward: Forward) -> None:
        self.bank, self.store, self._companies, self._forward = bank, store, companies, forward
        self.on, self._pool = picks(store.device), None
        self.clear()

    def clear(self) -> None:
        """Forget all steps: adapters have other values."""
        self._steps: OrderedDict[Key, _Step] = OrderedDict()
        self._refused: set[Key] = set()
        self._failed = 0
        self.forget()

    def forget(self) -> None:
        """Forget the steps of certain rows, which hold their adapters."""
        self._together: tuple[tuple[Running, ...], int, bool] = (), 0, False  # how often, and whether they may be
        self._forget_rows()

    def _forget_rows(self) -> None:
        for key in [key for key in self._steps if key[0] == ROWS]:
            del self._steps[key]

    def step(self, rows: Sequence[Running], values: Values, tables: Values) -> Tensor | None:
        """The logits (rows, vocabulary) of a step of `rows`, whose pasts are not moved on; None where it is not to be
        captured. `values` and `tables` are as in `inlay.batch.paged.Going`."""
        if not self.on or self._failed >= FAILURES:
            return None
        if torch.is_autocast_enabled(self.store.device.type) or hooked_everywhere():
            return None
        blocks = up_to(max(len(row.past.blocks) for row in rows), 4)
        shape = _rows(len(rows)), blocks, any(row.past.prefix for row in rows)
        companies = self._companies.of(rows)
        for key in (self._with_room(company, units, shape) for company, units in companies):
            if key is not None:
                return self._through(key, rows, values, tables)
        for key in ((TABLES, company, units, *shape) for company, units in companies):
            if key not in self._refused:
                return self._first(key, rows, values, tables)
        together, count, stands = self._together
        if stands and count >= PATIENCE and together == tuple(rows):
            return self._through((ROWS, together, 1, len(rows), *shape[1:]), rows, values, tables)
        return None

    def note(self, rows: Sequence[Running], found: Standing | None) -> None:
        """The rows have gone a step uncaptured; `found` is what their adapters do, where they have not gone before."""
        together, count, stands = self._together
        if together != tuple(rows):
            together, count, stands = tuple(rows), 0, found is not None
        self._together = together, count + 1, stands

    def _with_room(self, company: Company, units: int, shape: tuple[int, int, bool]) -> Key | None:
        """The smallest captured step for at least so much; up to twice the rows and blocks a GPU is hardly slower."""
        (rows, blocks, prefixed), most = shape, max(2 * shape[0], FEW)
        fitting = [
            key
            for key, step in self._steps.items()
            if key[1] is company
            and key[2] >= units
            and rows <= key[3] <= most
            and blocks <= key[4] <= 2 * blocks
            and key[5] >= prefixed
            and step.stands()
        ]
        return min(fitting, key=lambda key: key[2:], default=None)

    # ---- steps

    def _through(self, key: Key, rows: Sequence[Running], values: Values, tables: Values) -> Tensor | None:
        step = self._steps.get(key)
        if step is None:
            return self._first(key, rows, values, tables)
        self._steps.move_to_end(key)
        step.numbers.fill([_single(row) for row in rows], self.store.spare)
        self._tell(step, tuple(rows))
        step.replay()
        return step.logits[: len(rows)].clone()

    def _tell(self, step: _Step, rows: tuple[Running, ...]) -> None:
        """The slots of each row in the tables of a step."""
        if step.company is not None and step.told != rows:
            step.slots.copy_(step.company.slots(self._companies.owners(rows), *step.slots.shape[1:]))
            step.told = rows

    def _first(self, key: Key, rows: Sequence[Running], values: Values, tables: Values) -> Tensor | None:
        """Go a step as it is, and capture it for those to come; None where others have hooked something on."""
        if hooked(self.bank.model):
            return None
        _, _, _, count, blocks, prefixed = key
        numbers = StepNumbers.room(count, blocks, prefixed, self.store.device)
        numbers.fill([_single(row) for row in rows], self.store.spare)
        filling = [Past(1, blocks=[self.store.spare], own=1) for _ in range(count - len(rows))]
        pasts = [*(replace(row.past) for row in rows), *filling]
        going = Going(self.store, pasts, dict(values), tables, len(values), numbers)
        routes = [*(row.route for row in rows), *[None] * len(filling)]
        flight = self.bank.going_on(routes, [1] * count, [1] * count, going)
        logits = self._forward(flight, numbers.ids)
        self._capture(key, rows, numbers, flight, logits, tables)
        return logits[: len(rows)]

    def _capture(
        self, key: Key, rows: Sequence[Running], numbers: StepNumbers, flight: Flight, logits: Tensor,
        tables: Values,
    ) -> None:  # fmt: skip
        if not logits[: len(rows)].isfinite().all():
            return
        found, own = self.bank.standing(flight), key[0] == ROWS
        company = None if own else self._companies.learn(found, rows, tables)
        self._refuse(key)
        if found is None or (company is None and not own):
            return
        picked, units = list[Picked](), 1
        if company is None:
            self._forget_rows()
        else:
            units = company.units(self._companies.owners(rows))
            key = (TABLES, company, units, *key[3:])
            every = [one for one in found.products.values() if isinstance(one, Picked)]
            picked = [next(one for one in every if table.holds(one)) for table in company.tables]
        slots = torch.zeros(len(picked), len(logits), units, dtype=torch.long, device=logits.device)
        buffers = list(self.bank.model.buffers())  # a base may put others in their place
        step = _Step(numbers, logits, company, picked, slots, (flight if own else None, buffers))
        for one, numbers_of in zip(picked, slots, strict=True):
            one.numbers = numbers_of
        self._tell(step, tuple(rows))
        if self._records(step, flight, logits[: len(rows)]):
            self._keep(key, step)

    def _keep(self, key: Key, step: _Step) -> None:
        self._failed = 0
        self._steps[key] = step
        self._refused.discard(key)
        if key[0] == ROWS:
            self._together = (*self._together[:2], True)
        for old in [old for old, kept in self._steps.items() if not kept.stands()]:
            del self._steps[old]
        while len(self._steps) > MOST:
            self._steps.popitem(last=False)

    def _refuse(self, key: Key) -> None:
        """Do not try this one again."""
        self._steps.pop(key, None)
        if key[0] == ROWS:
            self._together = (*self._together[:2], False)
        else:
            self._refused.add(key)

    # ---- what is captured is checked

    def _records(self, step: _Step, flight: Flight, logits: Tensor) -> bool:
        """Capture a step that gave its rows `logits`, and see that it gives what it gives uncaptured: with other
        numbers, so that nothing of one step alone stands in it, and then with those of now. What the rows' blocks hold
        is the step's own, whatever comes of it."""
        real, ids = len(logits), step.numbers.ids
        true = step.numbers.whole.clone()
        step.numbers.whole.copy_(step.numbers.earlier(self.store.spare))
        try:
            if self._pool is None and logits.is_cuda:
                self._pool = torch.cuda.graph_pool_handle()
            expected = self._forward(flight, ids)
            step.replay, step.logits = record(lambda: self._forward(flight, ids), self._pool)
            step.replay()
            same = near(step.logits[:real], expected[:real])
        except (RuntimeError, UsageError) as error:  # a base that asks the GPU for a number cannot be captured
            log.info("a step is not captured: %s", str(error).partition("\n")[0])
            same = None
        step.numbers.whole.copy_(true)
        if same:
            step.replay()
            same = near(step.logits[:real], logits)
            if not same:
                self._forward(flight, ids)
        if same is False:
            log.warning("a captured step gave other logits than the step itself, and is not used")
        self._failed += not same
        return bool(same)


def _single(row: Running) -> tuple[Past, int, int]:
    return row.past, row.ids[row.past.own], row.shift


def _rows(count: int) -> int:
    """For how many rows a step of `count` is captured: an eighth more at most, from 16 on."""
    if count <= 16:
        return up_to(count, 1)
    return -(-count // 8) * 8 if count <= 64 else -(-count // 16) * 16
