"""The names that people choose among when a base is loaded; they need no torch."""

from __future__ import annotations

__all__ = ["DTYPES", "QUANTIZATIONS"]

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
QUANTIZATIONS = ("4bit",)
