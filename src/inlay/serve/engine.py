"""The engine of a server: one thread has the bank, and everything reaches it by a queue, between two steps.

Paper: Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models" (requests join and
leave at every step).
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from inlay.bank.bank import Bank
from inlay.errors import InlayError
from inlay.runtime.requests import Token

from .adapters import AdapterStore
from .checks import Limits
from .entries import plain_names, renamed
from .refusals import Busy, Forbidden, NotSettled, UnknownAdapter
from .scheduler import Scheduler, full
from .stats import EngineStats, TenantStats
from .tickets import Ask, Ticket, deliver
from .work import Work, told
from .writers import Writer, check_writes, writer_for

__all__ = ["Ask", "Busy", "Engine", "EngineStats", "Forbidden", "TenantStats", "Ticket", "UnknownAdapter"]

log = logging.getLogger("inlay.serve")

T = TypeVar("T")

IDLE, HELD = 1.0, 0.05
"""Seconds between looks where nothing is to be done, and where adapters' files are waited for."""


class Engine:
    """Answers asks over one bank. `store` bytes hold the keys and values of all rows, `most` answers are written at
    once, and `waiting` asks may wait.

    An ask waits in the inbox, then in the scheduler, and runs when it is its tenant's turn and there is room. An error
    in a step ends the asks that run with that error; the engine goes on. Raises: UsageError where the store is too
    small.
    """

    def __init__(
        self, bank: Bank, tokenizer: Any, adapters: AdapterStore, *, store: int, most: int, waiting: int
    ) -> None:  # fmt: skip
        bank.model.eval()
        self.bank, self.adapters = bank, adapters
        self._writer: Writer = writer_for(bank, tokenizer, store, most)
        self._limits = Limits(bank, tokenizer is not None, store, most)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._scheduler: Scheduler[Work] = Scheduler(most if bank.packs else None)
        self._held: list[Work] = []
        self._running: dict[int, Work] = {}
        self._works: dict[Ticket, Work] = {}
        self._lock = threading.Lock()
        self._waiting: Counter[str] = Counter()
        self._most_waiting, self._pace, self._ended = waiting, 1.0, time.monotonic()
        self._numbers, self._tokens = count(), 0
        self._stopping = self._begun = self._closed = False
        self._until = float("inf")
        self._thread = threading.Thread(target=self._run, name="inlay engine", daemon=True)
        adapters.bind(self._hand_over, lambda name: check_writes(bank, name), self._writer.forget)

    # ---- for any thread

    @property
    def ready(self) -> bool:
        return self._begun and self.alive and not self._stopping

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to answer."""
        if not self.bank.packs:
            log.warning("this base cannot keep packed segments apart: asks are answered in padded batches, in turn")
        self._thread.start()

    def stop(self, drain: float) -> None:
        """Take no more asks, let those that were taken end, for `drain` seconds at most, and stop; what has not ended
        by then ends with an error. Returns when the thread has ended."""
        with self._lock:
            self._stopping = True
        self._until = time.monotonic() + drain
        self._inbox.put(lambda: None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def submit(self, ask: Ask) -> Ticket:
        """Let an ask wait for its turn.

        Raises: UsageError where it can never be answered; UnknownAdapter; Busy where as many wait as may, or the engine
        is stopping.
        """
        self._limits.check(ask)
        claim = self.adapters.claim(ask.route)
        try:
            with self._lock:
                if self._stopping or not self.alive:
                    raise Busy(1.0, "the server is stopping" if self._stopping else "the engine is not running")
                if full(self._waiting, ask.tenant, self._most_waiting):
                    raise Busy(min(60.0, max(1.0, self._pace * self._waiting.total())))
                self._waiting[ask.tenant] += 1
                work = Work(Ticket(ask, lambda ticket: self._inbox.put(lambda: self._cancel(ticket))), claim)
                self._inbox.put(lambda: self._enqueue(work))
        except Busy:
            self.adapters.release(claim)
            raise
        return work.ticket

    def call(self, do: Callable[[Bank], T]) -> Future[T]:
        """Run a function of the bank between two steps, in the engine's thread."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(contextvars.copy_context().run(do, self.bank))
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if self.alive and not self._closed:
                self._inbox.put(run)
                return future
        future.set_exception(Busy(1.0, "the engine is not running"))
        return future

    def stats(self) -> EngineStats:
        """What is going on."""
        running = Counter(work.ask.tenant for work in list(self._running.values()))
        with self._lock:
            waiting = +self._waiting
        names = sorted({*running, *waiting})
        return EngineStats(
            running.total(), waiting.total(), {name: TenantStats(running[name], waiting[name]) for name in names},
            *self._writer.blocks(), self._tokens, self._writer.sent_back,
        )  # fmt: skip

    def _hand_over(self, do: Callable[[], T]) -> T:
        """Run a function in the thread that has the bank: at once before it was started, or where it is this one."""
        if not self.alive or threading.current_thread() is self._thread:
            return do()  # nobody else has the bank
        return self.call(lambda bank: do()).result()

    # ---- the engine's thread

    def _run(self) -> None:
        self._begun = True
        try:
            while not self._over():
                try:
                    self._read_inbox()
                    self._admit()
                    if self._writer.busy:
                        for tokens in self._writer.step(self._wanted):
                            self._deliver(tokens)
                        self._scheduler.stepped()
                    self.adapters.sweep()
                except Exception as error:
                    self._broken(error)
        finally:
            self._close()

    def _over(self) -> bool:
        if not self._stopping:
            return False
        return time.monotonic() >= self._until or not (self._works or self._waiting.total())

    def _read_inbox(self) -> None:
        """Do what was asked since the last step; where nothing else is to be done, wait for it."""
        nothing = not self._writer.busy and (not self._scheduler or bool(self._held))
        try:
            message = self._inbox.get(nothing, HELD if self._held or self._stopping else IDLE)
            while True:
                message()
                message = self._inbox.get_nowait()
        except Empty:
            return

    def _enqueue(self, work: Work) -> None:
        self._works[work.ticket] = work
        if work.ticket.cancelled:
            self._leave(work)
            return
        ask = work.ask
        self._scheduler.push(ask.tenant, work, len(ask.ids), ask.sampling.n)

    def _admit(self) -> None:
        """Let those begin whose turn it is, while there is room."""
        now = time.monotonic()
        for work in [work for work in self._held if work.retry <= now]:
            if self._fits(work):
                self._held.remove(work)
                self._begin(work)
        while (work := self._scheduler.take(self._fits)) is not None:
            self._begin(work)

    def _fits(self, work: Work) -> bool:
        return self._writer.room(len(work.ask.ids), work.ask.sampling.n)

    def _begin(self, work: Work) -> None:
        ask, number = work.ask, next(self._numbers)
        try:
            route = renamed(ask.route, self.adapters.begin(work.claim))
            self._writer.add(number, replace(ask, route=route))
        except NotSettled:
            work.retry = time.monotonic() + HELD
            self._held.append(work)
            return
        except Exception as error:
            work.ticket.fail(told(error))
            self._leave(work)
            return
        self._stop_waiting(work)
        work.number, work.ticket.admitted = number, time.monotonic()
        self._running[number] = work

    def _wanted(self, number: int) -> bool:
        there = time.monotonic() < self._until
        return there and number in self._running and not self._running[number].ticket.cancelled

    def _deliver(self, tokens: Sequence[Token]) -> None:
        pairs = [(self._running[token.request].ticket, token) for token in tokens if token.request in self._running]
        for _, token in pairs:
            if token.error is not None:
                plain_names(token.error)
        deliver(pairs)
        made = Counter(ticket.ask.tenant for ticket, token in pairs if token.id >= 0)
        self._tokens += made.total()
        self._scheduler.charge(made)
        for number in {token.request for _, token in pairs if token.finish_reason is not None}:
            work = self._running[number]
            if work.ticket.ended:  # one that was cancelled meanwhile leaves with its other answers
                self._leave(work)

    def _cancel(self, ticket: Ticket) -> None:
        work = self._works.get(ticket)
        if work is None:
            return
        if work.number >= 0:
            self._writer.cancel(work.number)
        elif work in self._held:
            self._held.remove(work)
        else:
            self._scheduler.remove(work.ask.tenant, work)
        self._leave(work)

    def _leave(self, work: Work) -> None:
        """An ask has ended, one way or another."""
        if self._works.pop(work.ticket, None) is None:
            return
        self._scheduler.end(work)
        if self._running.pop(work.number, None) is None:
            self._stop_waiting(work)
            return
        now = time.monotonic()
        self._pace, self._ended = 0.9 * self._pace + 0.1 * (now - self._ended), now

    def _stop_waiting(self, work: Work) -> None:
        self.adapters.release(work.claim)
        with self._lock:
            self._waiting[work.ask.tenant] -= 1

    def _broken(self, error: Exception) -> None:
        """A step has failed: what ran ends with the error, and the rest goes on."""
        log.error("a step failed; %d asks end with it", len(self._running), exc_info=error)
        self._end(list(self._running.values()), told(error))
        self._writer.reset()

    def _end(self, works: Sequence[Work], error: InlayError) -> None:
        for work in works:
            work.ticket.fail(error, max(work.number, 0))
            self._leave(work)

    def _close(self) -> None:
        """Leave nobody waiting."""
        with self._lock:
            self._stopping = self._closed = True
        while True:
            try:
                self._inbox.get_nowait()()
            except Empty:
                break
        self._end(list(self._works.values()), InlayError("the server has stopped", "Ask again when it is back."))
        self._writer.reset()
        self.adapters.sweep()
