"""Where virtual tokens may stand in a row."""

from __future__ import annotations

__all__ = ["PLACES"]

PLACES = ("start", "after-system", "before-answer")
