"""What a base is trained to do."""

from __future__ import annotations

__all__ = ["TASKS"]

TASKS = ("generate", "classify", "regress", "tag")
"""The model writes the answer; or a head gives a row's label, a number, or a tag for each word."""
