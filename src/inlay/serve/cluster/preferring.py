"""Which replica a request goes to: one adapter's requests stay together, so that few replicas hold each adapter.

Papers: Thaler and Ravishankar 1998, "Using Name-Based Mappings to Increase Hit Rates" (each name has its own order of
the servers, and a server that comes or goes moves only what is its own); Mirrokni et al. 2018, "Consistent Hashing with
Bounded Loads" (a server far above the mean passes names on to the next in their order).
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from hashlib import blake2b

__all__ = ["preferred"]

ABOVE = 1.25
"""How many times the mean of all replicas' open requests one may have before requests spill to others."""
FREE = 8
"""Open requests with which no replica counts as full."""


def preferred(name: str | None, open: Mapping[str, int], avoid: Collection[str] = ()) -> list[str]:
    """The replicas for a request that is routed by `name` (None for any), the best first; `open` is how many requests
    each replica works on. Those that are full come last, behind them those to `avoid`. Without a name the least loaded
    is first.
    """
    if avoid:
        good, bad = ({one: open[one] for one in open if (one in avoid) is wrong} for wrong in (False, True))
        return [*preferred(name, good), *preferred(name, bad)]
    by_load = sorted(random.sample(list(open), len(open)), key=lambda replica: open[replica])
    if name is None or not open:
        return by_load
    most = max(FREE, math.ceil(ABOVE * (sum(open.values()) + 1) / len(open)))
    own = sorted(open, key=lambda replica: _place(name, replica), reverse=True)
    free = [replica for replica in own if open[replica] < most]
    return [*free, *(replica for replica in by_load if open[replica] >= most)]


def _place(name: str, replica: str) -> bytes:
    return blake2b(f"{len(name)} {name} {replica}".encode("utf8", "replace"), digest_size=8).digest()
