"""How much memory is free, asked for without torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["free_memory"]


def free_memory() -> int:
    """Bytes that this process can still take: the machine's, or what its container leaves if that is less.

    A container's count includes files that the system keeps in memory and gives up when asked; those count as free.
    """
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, max(0, most - used + int(stat.get("inactive_file", 0))))
    return free
