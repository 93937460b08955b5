"""What one request needs: its model, its prompts as tokens, tickets at the engine, and answers read from them."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from inlay.bases.heads import can_write
from inlay.batch.route import RowSpec
from inlay.runtime.requests import Token, end_tokens, vocabulary_of
from inlay.runtime.sampling import Grammar, Sampling
from inlay.serve.experiments.store import Measured, Store
from inlay.serve.tickets import Ask, Ticket
from inlay.serve.watching import Watcher

from .answers import AnswerText, Head, TokenWords, usage_of
from .keys import Key
from .limits import Limits
from .metrics import Tallies
from .names import Named, Names
from .problems import Problem, problem_of
from .prompts import Prompt, Prompts
from .structured import Schemas
from .wire import Writing

if TYPE_CHECKING:
    from inlay.serve.adapters import AdapterStore
    from inlay.serve.engine import Engine

__all__ = ["Service", "Work"]

T = TypeVar("T")

log = logging.getLogger("inlay.serve")


@dataclass
class Service:
    """The engine, its adapters, and what the HTTP side knows of both. `base` is the base's name, `vocabulary` and
    `positions` are as in `Prompts`. With `share` tenants share what was read of common prompts; with `logs` prompts
    stand in the log. `experiments` is where those are kept, if any are.
    """

    engine: Engine
    adapters: AdapterStore
    tokenizer: Any
    base: str
    limits: Limits
    vocabulary: int
    positions: int | None
    share: bool = False
    logs: bool = False
    experiments: Store | None = None
    draining: bool = False
    tallies: Tallies = field(init=False)
    names: Names = field(init=False)
    prompts: Prompts = field(init=False)
    rows: Prompts = field(init=False)
    """For rows to classify, which the engine's thread encodes."""

    def __post_init__(self) -> None:
        self.names = Names(self.base, self.adapters, self.experiments)
        self.tallies = Tallies(self.engine)
        self.words = TokenWords(self.tokenizer)
        model, own = self.engine.bank.model, (self.limits, self.vocabulary, self.positions)
        self.prompts, self.rows = (Prompts(deepcopy(self.tokenizer), *own, can_write(model)) for _ in range(2))
        self.schemas = Schemas(self.tokenizer, end_tokens(model), vocabulary_of(model))
        self._encoding = ThreadPoolExecutor(1, "encoding")

    async def encode(self, do: Callable[[], T]) -> T:
        """What `do` gives, in the thread that encodes prompts. Raises: Problem."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoding, do)
        except Exception as error:
            raise problem_of(error) from None

    async def call(self, do: Callable[[Any], T]) -> T:
        """What `do` gives of the bank, between two steps of the engine. Raises: Problem."""
        try:
            return await asyncio.wrap_future(self.engine.call(do))
        except Exception as error:
            raise problem_of(error) from None

    def check_count(self, prompts: int, n: int) -> None:
        """Raises: Problem where one request asks for too many answers."""
        most = self.limits.max_answers
        if not 1 <= n <= most or prompts * n > most:
            raise Problem(400, f"{prompts} prompts times n {n} are asked for. Ask for 1 to {most} answers.", param="n")

    async def grammar(self, body: Writing) -> Grammar | None:
        """What an answer's tokens may be; None where they may be any. Raises: Problem."""
        if body.response_format is None:
            return None
        if body.ignore_eos or body.min_tokens:
            raise Problem(400, "response_format says where an answer ends. Leave ignore_eos and min_tokens out.")
        return await self.encode(lambda: self.schemas.read(body.response_format))

    def bank_route(self, named: Named) -> RowSpec:
        """A model's route by the names of the bank, in the engine's thread. Raises: InlayError."""
        if isinstance(named.route, Mapping):
            return {self.adapters.resolve(name): weight for name, weight in named.route.items()}
        return self.adapters.resolve(named.route) if isinstance(named.route, str) else None

    async def began(self, named: Named, key: Key, head: Head) -> None:
        """Keep which arm of an experiment the answer `head` has, before anybody learns of it. Raises: Problem."""
        if named.trial is None or self.experiments is None:
            return
        named.trial.id, head.arm = head.id, named.trial.arm
        try:
            await asyncio.to_thread(self.experiments.began, named.trial, key.name)
        except Exception as error:
            raise problem_of(error) from None

    def ended(self, named: Named, measured: Measured) -> None:
        """Count a request to an experiment."""
        if named.trial is not None and named.trial.id and self.experiments is not None:
            self.experiments.end_later(named.trial, measured)

    def submit(self, named: Named, key: Key, prompts: Sequence[Prompt], settings: Sequence[Sampling]) -> Work:
        """Hand the prompts to the engine, all or none. Raises: Problem."""
        if self.draining:
            raise Problem(503, "the server is stopping", "stopping", headers={"Retry-After": "1"})
        if self.logs:
            log.info("%s by %s: %r", named.title, key.name, [self.tokenizer.decode(one.ids) for one in prompts])
        tickets: list[Ticket] = []
        scope = "" if self.share else key.name
        try:
            for prompt, sampling in zip(prompts, settings, strict=True):
                ask = Ask(
                    named.route, prompt.ids, sampling, prompt.place, tenant=key.name, scope=scope, name="the request"
                )
                tickets.append(self.engine.submit(ask))
        except Exception as error:
            for ticket in tickets:
                ticket.cancel()
            raise problem_of(error) from None
        return Work(self, named, list(prompts), tickets)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The engine answers, until `stop`, and as long as the context is entered new, changed and vanished adapters in
        the folders are found.

        Python's collector looks at what was made before no more: base and libraries stay, and a look at their half
        million objects stops all rows for some tenths of a second."""
        self.engine.start()
        watcher = Watcher(self.adapters)
        watcher.start()
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            watcher.stop()

    def stop(self) -> None:
        """Take no more requests, and end those under way."""
        self.draining = True
        self.engine.stop(0.0)
        self._encoding.shutdown(wait=False, cancel_futures=True)
        if self.experiments is not None:
            self.experiments.close()


@dataclass
class Work:
    """The answers of one request, while they are written: a ticket a prompt."""

    service: Service
    named: Named
    prompts: list[Prompt]
    tickets: list[Ticket]
    answers: dict[tuple[int, int], AnswerText] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for prompt, ticket in enumerate(self.tickets):
            count = ticket.ask.sampling.n
            for answer in range(count):
                self.answers[prompt, answer] = AnswerText(prompt, prompt * count + answer)

    async def tokens(self) -> AsyncIterator[tuple[AnswerText, Token]]:
        """Every token with its answer, which has taken it. Raises: Problem where an answer fails."""
        async for prompt, token in _merged(self.tickets):
            if token.error is not None:
                raise problem_of(token.error)
            answer = self.answers[prompt, token.answer]
            self.service.tallies.token(self.named, self.tickets[prompt])
            answer.add(token)
            yield answer, token

    async def whole(self) -> list[AnswerText]:
        """All answers, when they have ended. Raises: Problem."""
        async for _ in self.tokens():
            pass
        return list(self.answers.values())

    def usage(self) -> dict[str, Any]:
        made = sum(len(answer.ids) for answer in self.answers.values())
        return usage_of(self.prompts, made, sum(ticket.cached for ticket in self.tickets))

    def end(self, outcome: str) -> None:
        """Leave what still goes on, and count the request."""
        for ticket in self.tickets:
            ticket.cancel()
        usage = self.usage()
        self.service.tallies.ended(self.named, usage, self.tickets, outcome)
        first, between = _times(self.tickets)
        self.service.ended(
            self.named, Measured(outcome, usage["prompt_tokens"], usage["completion_tokens"], first, between)
        )


def _times(tickets: Sequence[Ticket]) -> tuple[float | None, float | None]:
    """Seconds to the first token of a request, and between two tokens where it has one answer."""
    first = min((one.first - one.submitted for one in tickets if one.first is not None), default=None)
    alone = tickets[0] if len(tickets) == 1 and tickets[0].ask.sampling.n == 1 else None
    if alone is None or alone.first is None or alone.last is None or alone.made < 2:
        return first, None
    return first, (alone.last - alone.first) / (alone.made - 1)


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Token]]:
    """The tokens of several tickets as they come, with the ticket's number."""
    if len(tickets) == 1:
        async for token in tickets[0]:
            yield 0, token
        return
    queue: asyncio.Queue[tuple[int, Token | None]] = asyncio.Queue(4 * len(tickets))

    async def pump(number: int) -> None:
        async for token in tickets[number]:
            await queue.put((number, token))
        await queue.put((number, None))

    tasks = [asyncio.create_task(pump(number)) for number in range(len(tickets))]
    try:
        left = len(tasks)
        while left:
            number, token = await queue.get()
            if token is None:
                left -= 1
            else:
                yield number, token
    finally:
        for task in tasks:
            task.cancel()
