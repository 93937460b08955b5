"""The turns of a run: before the first step and after each one, who enters and leaves the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from inlay.training.plan import Plan

from .asking import Ask, Requests
from .context import Context
from .events import Event, Events, read_events
from .progress import Progress

__all__ = ["Select", "Selection", "Turns"]


@dataclass(frozen=True)
class Selection:
    """Learners to `stop`, by name with the reason, and names of waiting plans to `start`."""

    stop: Mapping[str, str] = field(default_factory=dict)
    start: Sequence[str] = ()


Select = Callable[[Sequence[Progress], Sequence[Plan]], Selection]
"""From the learners so far and the plans that wait, who stops and who starts. It is called before the first step and
after each one, and must depend on nothing else, so that a resumed run chooses as before."""


class Turns:
    """Asks `select` at each turn, and keeps what it said and what memory did as events.

    A resumed run does what the events say: were one of them decided anew, a difference of rounding could make another
    stream of it.
    """

    def __init__(self, context: Context, select: Select | None) -> None:
        self.context, self._select = context, select
        self.turn, self.done = 0, list[str]()
        self._events: Events | None = None
        self._requests = Requests(context.folder.requests)

    @property
    def selects(self) -> bool:
        return self._select is not None

    def begin(self, again: bool) -> None:
        """Begin a run, `again` where one was begun in the folder and left no checkpoint."""
        self._open(-1 if again else None)

    def go_on(self, turn: int, done: Sequence[str]) -> list[Ask]:
        """Go on after `turn`, of which a checkpoint holds all that came of it; returns the asks that are `done`."""
        self.turn, self.done = turn, list(done)
        self._open(turn)
        found = [_ask(event) for event in read_events(self.context.folder.events) if event["event"] == "ask"]
        return [ask for ask in found if ask.id in self.done]

    def _open(self, since: int | None) -> None:
        self._events = Events(self.context.folder.events, since, self.done)
        written = {str(event["id"]) for event in read_events(self.context.folder.events) if event["event"] == "ask"}
        self._requests = Requests(self.context.folder.requests, written)

    def asks(self) -> Iterator[Ask]:
        """What is asked at this turn: first what was asked of an earlier process. Each is done before the next."""
        while (event := self._ahead("ask")) is not None:
            yield _ask(event)
            self.done.append(event["id"])
        for ask in self._requests.waiting():
            self._add("ask", **ask.to_dict())
            yield ask
            self.done.append(ask.id)
            self._requests.drop(ask)

    def choose(self, progress: Sequence[Progress], waiting: Sequence[Plan]) -> Selection:
        """Who stops and who starts at this turn."""
        if self._select is None:
            return Selection()
        if (event := self._ahead("select")) is not None:
            return Selection(event["stop"], event["start"])
        chosen = self._select(progress, waiting)
        if chosen.stop or chosen.start:
            self._add("select", stop=dict(chosen.stop), start=list(chosen.start))
        return chosen

    @contextmanager
    def work(self, kind: str, name: str = "") -> Iterator[None]:
        """Around a step, or the scoring of the learner `name`: in how many tokens at once it was done."""
        budget, own = self.context.budget, {"work": kind, "name": name}
        if (event := self._ahead("cut", **own)) is not None:
            budget.tokens = event["tokens"]
        before = budget.tokens
        yield
        if budget.tokens != before:
            self._add("cut", **own, tokens=budget.tokens)

    def _ahead(self, kind: str, **what: Any) -> Event | None:
        return None if self._events is None else self._events.ahead(self.turn, kind, **what)

    def _add(self, kind: str, **what: Any) -> None:
        assert self._events is not None
        try:
            self._events.add(self.turn, kind, **what)
        except OSError as error:
            why = error.strerror or error
            self.context.on_message(f"what happened at turn {self.turn} is not written ({why}); training goes on")


def _ask(event: Event) -> Ask:
    return Ask(event["what"], event["name"], event["settings"], event["id"])
