"""The board of a race, on stderr: every contender's place with its settings, its last score and its state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.live import Live
from rich.table import Table

from .bar import Bar
from .common import console, number

if TYPE_CHECKING:
    from inlay.race.places import Place

__all__ = ["Board"]

EVERY = 0.5
"""Seconds between two drawings."""
WIDE = 120
"""Columns of a terminal that takes settings and losses too."""


class Board(Bar):
    """As the bar of a run of one, for many learners; lines of text where stderr is no terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._turn: tuple[Any, Any, Any] | None = None
        self._known: dict[Any, Any] = {}
        self._live: Live | None = None
        self._drawn, self._started = 0.0, time.monotonic()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
        super().__exit__(*error)

    def turn(self, progress: Sequence[Any], waiting: Sequence[Any], shares: Sequence[float]) -> None:
        """Show the contenders, if it is time."""
        self._turn = progress, waiting, shares
        now = time.monotonic()
        if now - self._drawn < EVERY or not console.is_terminal:
            return
        self._drawn = now
        if self._live is None:
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(self._table(), refresh=True)

    def step(self, learner: Any, total: int) -> None:
        """Turns tell all of it."""

    def _table(self) -> Table:
        from inlay.race.places import places
        from inlay.runtime.memory import current_memory_mb

        assert self._turn is not None
        found, seconds = places(*self._turn, self._known), max(time.monotonic() - self._started, 1e-9)
        tokens, live = sum(own.tokens for own in found), sum(own.state == "training" for own in found)
        title = f"{live} of {len(found)} in the stream, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, "
        return board(found, f"{title}{current_memory_mb():,.0f} MB", console.width >= WIDE)


def board(found: Sequence[Place], title: str, wide: bool) -> Table:
    """The contenders in their places; with settings and losses where it is to be `wide`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    names = ["", "contender", *(["settings", "loss"] if wide else []), "choosing rows", "tokens", "step", "state"]
    for name in names:
        words = name in ("contender", "settings", "state")
        table.add_column(name, justify="left" if words else "right", no_wrap=True, overflow="ellipsis")
    for place, own in enumerate(found, 1):
        within = "" if own.interval is None else f" ({number(own.interval[0])} – {number(own.interval[1])})"
        score = "–" if own.score is None else f"{number(own.score)}{within}"
        steps = f"{own.step}/{own.total or '–'}"
        table.add_row(
            str(place), own.name, *([own.line, number(own.loss)] if wide else []), score, f"{own.tokens:,}", steps,
            own.state.removeprefix("dropped at "),
        )  # fmt: skip
    return table
