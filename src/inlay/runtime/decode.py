"""Writing: rows of any adapters read their prompts and go on, token after token, in one stream of a frozen base."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor

from inlay.bank.bank import Bank
from inlay.bank.going import Flight
from inlay.batch.paged import Going
from inlay.batch.pages import StoreFull
from inlay.batch.past import BLOCK, Past, Store
from inlay.batch.route import RowSpec
from inlay.errors import UsageError
from inlay.sites.positions import positions_of

from .captured import Captured
from .companies import Companies
from .made import Made
from .running import Running
from .sharing import Names
from .token_bytes import token_bytes

__all__ = ["CHUNK", "STORE", "Decoder"]

CHUNK = 512
"""Tokens of prompts that one forward reads beside the rows that write."""
STORE = 2**30
"""Bytes of a key-value store where nobody says."""


class Decoder:
    """Rows over one bank: `add` one at any time, `step` all, `write` what was chosen, `end` one when it is done.

    `store` bytes hold the keys and values of all rows; `chunk` tokens of prompts are read in one step, `most` rows
    write at once; their adapters must not change meanwhile. A row that finds no room waits; where those that write
    need more, the last one that came is sent back to wait, and reads what it had again. Rows of one adapter and one
    `scope` share what they have read in common.
    """

    def __init__(self, bank: Bank, store: int = STORE, chunk: int = CHUNK, most: int = 256) -> None:
        model: Any = bank.model
        if not bank.packs:
            raise UsageError("this base cannot keep packed segments apart", "Write with padded rows.")
        self.bank, self.chunk, self.most, self.positions = bank, chunk, most, positions_of(model)
        self.names = Names(bank)
        bank.quicken(_has_room(model))
        self._picks = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.store = Store(store, token_bytes(bank), model.dtype, model.device)
        self.waiting: deque[Running] = deque()
        self.rows: list[Running] = []
        self._flight: tuple[tuple[Running, ...], Flight] | None = None
        self._made, self._known, self._tables = Made(), None, {}
        self._count, self.sent_back = 0, 0  # the last: rows that made room
        self._companies = Companies(bank)
        self._captured = Captured(bank, self.store, self._companies, self._forward)

    # ---- rows

    def add(self, route: RowSpec, ids: Sequence[int], new: int, place: int = 0, scope: str = "") -> Running:
        """A row that is to write at most `new` tokens behind `ids`; its virtual tokens stand before token `place`.

        Raises: UsageError where it is longer than the base has positions for, or than the store.
        """
        if not ids:
            raise UsageError("the prompt has no tokens", "Give some words.")
        blend = self.bank.take_off(route)
        try:
            ahead = sum(a.prefix_length + a.virtual_length for a in (self.bank.adapters[name] for name, _ in blend))
            self._check(len(ids), new, ahead, self.bank.taken_by(route))
        except UsageError:
            self.bank.land(blend)
            raise
        whole = place > 0 or not all(self._causal(name) for name, _ in blend)
        if self.names.renew(blend):  # what was made of the old values serves nobody
            self._made, self._tables = Made(), {}
            self._flight = self._known = None
            self._companies.clear()
            self._captured.clear()
        root = self.names.root(blend, scope)
        row = Running(
            route, blend, list(ids), Past(len(ids), place), whole, ahead, self.bank.shift_of(blend), root, self._count
        )
        self._count += 1
        self.waiting.append(row)
        return row

    def fork(self, row: Running) -> Running:
        """Another row that has read what `row` has, and may write other tokens."""
        blend = self.bank.take_off(row.route)
        past = self.store.fork(row.past)
        ids, names = list(row.ids), list(row.names)
        made = replace(row, blend=blend, ids=ids, past=past, age=self._count, names=names, lands=True)
        self._count += 1
        self.rows.append(made)
        return made

    def write(self, row: Running, token: int) -> None:
        """The row goes on with a token."""
        row.ids.append(token)

    def end(self, row: Running) -> None:
        """Take a row out, written or not; its blocks and its adapters are free."""
        if row in self.rows:
            self.rows.remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)
        if row.lands:
            self.store.release(row.past)
            self.bank.land(row.blend)
            row.lands = False

    def forget(self) -> None:
        """Let go of what was made of adapters that the bank has no longer."""
        self._made.forget(self.bank)
        self.names.forget()
        self._flight = self._known = None
        self._companies.forget()
        self._captured.forget()

    def _check(self, prompt: int, new: int, ahead: int, moved: int) -> None:
        if self.positions is not None and prompt + new + moved > self.positions:
            own = f"the prompt takes {prompt}," + (f" its adapters {moved}," if moved else "")
            raise UsageError(
                f"the base has {self.positions} positions for a row; {own} and {new} new tokens are asked for",
                "Give a shorter prompt, or write fewer tokens.",
            )
        self.store.check_fits(prompt + new + ahead)

    def _causal(self, name: str) -> bool:
        adapter = self.bank.adapters[name]
        return all(part.method.causal for part in adapter.parts) and all(map(self._causal, adapter.uses))

    # ---- steps

    @torch.no_grad()
    def step(self) -> tuple[list[Running], Tensor | None]:
        """Read what can be read: one token of every row that writes, and some of those that wait. Returns the rows
        that are to write a token, and the logits (rows, vocabulary) for it."""
        done: list[tuple[list[Running], Tensor]] = []
        writing = self._with_room([row for row in self.rows if row.unread == 1 and row.past.own])
        if writing:
            done.append((writing, self._stepped(writing)))
        entering = self._admitted()
        if entering:
            rows, counts = [row for row, _ in entering], [count for _, count in entering]
            ends = [int(row.unread == count) for row, count in entering]
            logits = self._run(self._begun(rows, counts, ends, {}), rows, counts, ends)
            ready = [row for row, end in zip(rows, ends, strict=True) if end]
            if ready:
                done.append((ready, logits))
        if not done:
            return [], None
        return [row for rows, _ in done for row in rows], torch.cat([logits for _, logits in done])

    def _with_room(self, rows: list[Running]) -> list[Running]:
        """Rows for whose next token there is room; the last that came make room for the rest."""
        rows = sorted(rows, key=lambda row: row.age)
        kept: list[Running] = []
        while rows:
            row = rows.pop(0)
            try:
                self.store.reserve(row.past, 1)
                kept.append(row)
            except StoreFull:
                last = max(self.rows, key=lambda other: other.age)
                self._send_back(last)
                rows = [other for other in rows if other is not last]
                if last is not row:
                    rows.insert(0, row)
        return [row for row in self.rows if row in kept]

    def _send_back(self, row: Running) -> None:
        self.rows.remove(row)
        self.store.release(row.past)
        row.names = []
        self.sent_back += 1
        self.waiting.appendleft(row)

    def _admitted(self) -> list[tuple[Running, int]]:
        """Rows that read more than one token now, with how many."""
        left, found = self.chunk, []
        for row in [row for row in self.rows if row.unread > 1 or not row.past.own]:
            left -= self._enter(row, left, found)
        while self.waiting and left > 0 and len(self.rows) < self.most:
            row = self.waiting[0]
            taken = self._enter(row, left, found)
            if not taken:
                break
            self.waiting.popleft()
            self.rows.append(row)
            left -= taken
        return found

    def _enter(self, row: Running, left: int, found: list[tuple[Running, int]]) -> int:
        """Let a row read at most `left` tokens, or its whole prompt where it has to; returns how many it takes."""
        self._begin(row)
        prompt = row.past.prompt - row.past.own
        count = prompt if row.whole and prompt > 0 else min(left, row.unread)
        if count <= 0 or (count > left and found):
            return 0
        try:
            self.store.reserve(row.past, count if row.past.keys else count + row.ahead)
        except StoreFull:
            if not self.rows and not found:
                raise
            return 0
        found.append((row, count))
        return count

    # ---- what rows have in common

    def _begin(self, row: Running) -> None:
        """Let a row begin with what others have read of its tokens; it reads one at least itself."""
        if row.past.blocks or row.whole:
            return
        names = list(self.names.blocks(row.root, row.ahead, row.ids[:-1]))
        keys = self.store.begin(row.past, names)
        if keys < row.ahead:
            self.store.release(row.past)
        elif keys:
            virtual = sum(self.bank.adapters[name].virtual_length for name, _ in row.blend)
            row.past.prefix, row.past.virtual, row.past.own = row.ahead - virtual, virtual, keys - row.ahead
            row.cached, row.names = min(row.past.own, row.past.prompt), names[: len(row.past.blocks)]

    def _name(self, row: Running) -> None:
        """Let others find the blocks that a row has filled."""
        if row.whole or row.past.keys // BLOCK == len(row.names):
            return
        for name in self.names.blocks(row.root, row.ahead, row.ids[: row.past.own], list(row.names)):
            self.store.pages.name(row.past.blocks[len(row.names)], name)
            row.names.append(name)

    # ---- forwards

    def _stepped(self, rows: list[Running]) -> Tensor:
        """The logits of rows that have one new token each."""
        logits = self._captured.step(rows, self._made, self._tables)
        if logits is not None:
            for row in rows:
                row.past.own += 1
                self._name(row)
            return logits
        flight, first = self._flown(rows)
        logits = self._run(flight, rows, *[[1] * len(rows)] * 2)
        found = self.bank.standing(flight) if first else None
        self._companies.learn(found, rows, self._tables)
        self._captured.note(rows, found)
        return logits

    def _flown(self, rows: list[Running]) -> tuple[Flight, bool]:
        """The flight of rows that write, the same as at the last step where they are the same; and whether it has to
        find out what their adapters do."""
        key = tuple(rows)
        if self._flight is not None and self._flight[0] == key:
            return self._flight[1], False
        known, ones = self._companies.values(rows), [1] * len(rows)
        self._flight = key, self._begun(rows, ones, ones, known or {})
        return self._flight[1], known is None

    def _begun(self, rows: list[Running], counts: Sequence[int], ends: Sequence[int], known: dict[Any, Any]) -> Flight:
        values = {**self._made, **known}
        going = Going(self.store, [row.past for row in rows], values, self._tables, len(values))
        return self.bank.going_on([row.route for row in rows], counts, ends, going)

    def _run(self, flight: Flight, rows: list[Running], counts: Sequence[int], heads: Sequence[int]) -> Tensor:
        """The logits (n, vocabulary) of the last token of each row that has read all it had."""
        device = self.store.device
        ids = [token for row, n in zip(rows, counts, strict=True) for token in row.ids[row.past.own : row.past.own + n]]
        ends = [sum(counts[: n + 1]) - 1 for n, head in enumerate(heads) if head]
        index = torch.tensor(ends, dtype=torch.long, device=device)
        logits = self._forward(flight, torch.tensor([ids], device=device), index)
        for row in rows:
            self._name(row)
        if flight is not self._known:
            self._known = flight
            self._made.keep(flight.route.going.values, flight.route.going.known)
        return logits

    def _forward(self, flight: Flight, ids: Tensor, index: Tensor | None = None) -> Tensor:
        """The logits (n, vocabulary) of the tokens that `index` (n,) names, of all where it is None."""
        model: Any = self.bank.model
        index = torch.arange(ids.shape[1], device=ids.device) if index is None else index
        with flight.step():
            if self._picks:
                return model(input_ids=ids, logits_to_keep=index).logits[0]
            return model(input_ids=ids).logits[0].index_select(0, index)


def _has_room(model: Any) -> bool:
    """Whether a copy of the base takes a quarter of the free memory at most."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return model.device.type == "cpu" and 4 * size <= psutil.virtual_memory().available
