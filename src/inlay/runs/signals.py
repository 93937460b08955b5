"""Ctrl-C and SIGTERM ask a run to end after its step; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Asked", "asked_to_stop"]


@dataclass
class Asked:
    """Whether somebody has asked the run to stop."""

    yes: bool = False


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """BestCheckpoint for SIGINT and SIGTERM while inside (in a main thread; elsewhere nothing is watched)."""
    asked = Asked()

    def note(number: int, frame: Any) -> None:
        if asked.yes:
            raise KeyboardInterrupt
        asked.yes = True

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
