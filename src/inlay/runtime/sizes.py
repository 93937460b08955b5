"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from inlay.errors import UsageError

__all__ = ["size_mb"]

UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def size_mb(text: str) -> float:
    """ "4GB" or "900MB" in MiB. Raises: UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])i?b?\s*", text.lower())
    if found is None or not float(found[1]):
        raise UsageError(f"memory limit {text!r} cannot be read", "Write 4GB or 900MB, auto or none.")
    return float(found[1]) * UNITS[found[2]] / 2**20
