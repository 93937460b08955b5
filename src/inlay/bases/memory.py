"""How much memory is free, asked for without torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["free_memory"]


def free_memory() -> int:
    """Bytes that this process can still take: the machine's, or what its container leaves if that is less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(0, most - used))
    return free
