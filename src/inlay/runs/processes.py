"""A run is one process: several that write to one folder would each train on all rows."""

from __future__ import annotations

import os

from inlay.errors import UsageError

__all__ = ["check_one_process"]


def check_one_process() -> None:
    """Raises: UsageError where a launcher such as torchrun says that it has started several processes (WORLD_SIZE)."""
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdigit() and int(started) > 1:
        raise UsageError(
            f"{started} processes were started (WORLD_SIZE), and one run is one process",
            "Start it without torchrun; for several processes use transformers' Trainer with inlay.InlayCallback, or "
            "DistributedDataParallel over inlay.InlayModule.",
        )
