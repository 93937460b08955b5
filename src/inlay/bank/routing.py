"""Which route is in force: routes live in a ContextVar, so that threads, tasks and models have their own."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import FrameType, TracebackType
from weakref import ref

from inlay.batch.route import Route
from inlay.errors import UsageError

__all__ = ["Opened", "Routing"]

MANAGERS = frozenset({"contextlib", "contextlib2", "_pytest", "pytest_asyncio", "pluggy"})
"""Libraries that run a generator as a context manager or a fixture: what it opens is meant for who asked for it."""


class Opened:
    """A route as a context manager: in force inside the `with` block, in the context that entered it.

    `place` is the thread and the asyncio task that opened it; `generator` is the number of the frame of the generator
    whose block it is, and `where` that is: it shares its consumer's context, and the ContextVar cannot tell them apart.
    """

    def __init__(self, routing: Routing, route: Route) -> None:
        self.routing, self.route = routing, route
        self.state = "new"
        self.place: tuple[int, int] = (0, 0)
        self.generator: int | None = None
        self.where = ""

    def __enter__(self) -> None:
        if self.state != "new":
            raise UsageError("this route was entered before", "Call bank.route anew for each `with` block.")
        self.routing.check(self.route)
        frame = next(_generators(sys._getframe(1)), None)
        if frame is not None:
            self.generator = id(frame)
            self.where = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
        self.place, self.state = _here(), "open"
        self.routing.note(self)
        _ROUTES.set((*_ROUTES.get(), self))

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.state = "closed"
        self.routing.forget(self)
        before = _ROUTES.get()
        _ROUTES.set(tuple(opened for opened in before if opened is not self))
        later = before[before.index(self) + 1 :] if self in before else ()
        # Blocks of different generators may end in any order: each generator has its own.
        if kind is None and any(o.generator == self.generator and o.state == "open" for o in later):
            raise UsageError("a route was left while one opened after it was still open", "Close routes in order.")


_ROUTES: ContextVar[tuple[Opened, ...]] = ContextVar("inlay_routes", default=())


class Routing:
    """The routes of one bank over its `adapters`. `default` is what `bank.set` said, for all threads; None where it
    said nothing."""

    def __init__(self, adapters: Mapping[str, object]) -> None:
        self.adapters = adapters
        self.default: Route | None = None
        self._opened: set[ref[Opened]] = set()  # weak: a thread may end inside of its block
        self.in_flight: Counter[str] = Counter()  # adapters of rows that go on, with how many there are

    def open(self, route: Route) -> Opened:
        return Opened(self, route)

    def note(self, opened: Opened) -> None:
        self._opened.add(ref(opened, self._opened.discard))

    def forget(self, opened: Opened) -> None:
        self._opened.discard(ref(opened))

    def _open(self) -> list[Route]:
        """The routes that are open in any thread."""
        return [opened.route for known in tuple(self._opened) if (opened := known()) is not None]

    def check(self, route: Route) -> None:
        """Raises: UsageError where an adapter was removed since the route was made."""
        for name in _names(route):
            if name not in self.adapters:
                raise UsageError(f"adapter {name!r} was removed after this route was made", "Make the route anew.")

    def current(self) -> Route | None:
        """The route that holds here; None where none was ever opened. Raises: UsageError where it cannot be told."""
        # A block of this very task that has ended elsewhere, as closed generators do, has ended.
        mine = [o for o in _ROUTES.get() if o.routing is self and (o.state == "open" or o.place != _here())]
        if mine:
            found = mine[-1] if all(opened.generator is None for opened in mine) else _innermost(mine)
            if found.state == "closed":
                raise UsageError(
                    "the route that this task or thread began in is closed",
                    "Open a route in the task itself, or await it inside the route.",
                )
            return found.route
        if self.default is None and any(map(_changes, self._open())):
            raise UsageError(
                "a route is open in another thread or task, and none here",
                "Say which adapters run here: bank.route([None]) is the plain base, bank.set(...) holds for all "
                "threads, and contextvars.copy_context().run takes a route along.",
            )
        return self.default

    def uses(self, name: str) -> bool:
        """Whether any route that is open in any thread, or the default, uses the adapter."""
        return any(name in _names(route) for route in (*self._open(), self.default) if route is not None)


def _names(route: Route) -> set[str]:
    return {name for blend in route.blends for name, _ in blend}


def _changes(route: Route) -> bool:
    """Whether a forward under the route differs from the base's own."""
    return any(route.blends) or route.lengths is not None or route.noise is not None


def _innermost(mine: list[Opened]) -> Opened:
    """The route whose block is the innermost around the code that runs now.

    Raises: UsageError where that is a suspended generator's.
    """
    here, running = _here(), [id(frame) for frame in _generators(sys._getframe(1))]
    suspended = [o for o in mine if o.generator is not None and o.generator not in running]
    for number in [*running, None]:
        found = next((o for o in reversed(mine) if o.generator == number), None)
        if found is None:
            continue
        if found.place != here and any(o.place != here for o in suspended):
            raise UsageError(
                "this task or thread began inside of routes of a generator and of its consumer",
                "Open a route in the task or thread itself.",
            )
        return found
    last = mine[-1]
    # A thread gets a context from those alone who copy it on purpose, and then the generator goes on beside it.
    if last.place[0] != here[0] and len({o.generator for o in mine}) == 1:
        return last
    raise UsageError(
        f"the route in force was opened inside the generator {last.where}, which is suspended",
        "Close that generator, or open a route of your own here.",
    )


def _here() -> tuple[int, int]:
    """The thread and the asyncio task that run."""
    tasks = sys.modules.get("asyncio.tasks")
    try:
        task = None if tasks is None else tasks.current_task()
    except RuntimeError:  # no loop runs in this thread
        task = None
    return threading.get_ident(), 0 if task is None else id(task)


def _generators(frame: FrameType | None) -> Iterator[FrameType]:
    """The generators that run, the innermost first."""
    while frame is not None:
        if frame.f_code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR) and not _managed(frame):
            yield frame
        frame = frame.f_back


def _managed(frame: FrameType) -> bool:
    caller = frame.f_back
    return caller is not None and str(caller.f_globals.get("__name__")).partition(".")[0] in MANAGERS
