"""What the engine tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["EngineStats", "TenantStats"]


@dataclass(frozen=True)
class TenantStats:
    """Asks of one tenant."""

    running: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Asks that run and that wait, those of each tenant, blocks of the key-value store, `tokens` that were made, and
    how often a row was `preempted`: it made room, and read again what it had."""

    running: int = 0
    waiting: int = 0
    tenants: Mapping[str, TenantStats] = field(default_factory=dict)
    blocks_used: int = 0
    blocks: int = 0
    tokens: int = 0
    preempted: int = 0
