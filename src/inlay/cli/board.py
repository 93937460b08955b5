"""The board of a race, on stderr: every contender with its settings, its last score and its state."""

from __future__ import annotations

import time
from typing import Any

from rich.live import Live
from rich.table import Table

from .bar import Bar
from .common import console, number

__all__ = ["Board"]

EVERY = 0.5
"""Seconds between two drawings."""


class Board(Bar):
    """As the bar of a run of one, for many learners; lines of text where stderr is no terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._learners: dict[str, tuple[Any, int]] = {}
        self._live: Live | None = None
        self._drawn, self._started = 0.0, time.monotonic()

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
        super().__exit__(*error)

    def step(self, learner: Any, total: int) -> None:
        self._learners[learner.plan.name] = learner, total
        now = time.monotonic()
        if now - self._drawn < EVERY or not console.is_terminal:
            return
        self._drawn = now
        if self._live is None:
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        from inlay.runtime.memory import current_memory_mb

        learners = [learner for learner, _ in self._learners.values()]
        tokens, seconds = sum(own.tokens for own in learners), max(time.monotonic() - self._started, 1e-9)
        live = sum(own.live for own in learners)
        table = Table(
            title=f"{live} of {len(learners)} in the stream, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, "
            f"{current_memory_mb():,.0f} MB",
            title_justify="left",
        )
        for name in ("contender", "step", "loss", "state"):
            table.add_column(name, justify="right" if name in ("step", "loss") else "left")
        for name, (own, total) in self._learners.items():
            table.add_row(name, f"{own.step}/{total}", number(own.loss), own.stopped or "training")
        return table
