"""What a key-value store needs for a token."""

from __future__ import annotations

from typing import Any

from inlay.bank.bank import Bank
from inlay.errors import UsageError

__all__ = ["token_bytes"]


def token_bytes(bank: Bank) -> int:
    """What the keys and values of one token take in all layers of a bank's base."""
    model: Any = bank.model
    inside = {module for stack in bank.base.stacks for module in stack.modules()}
    seen = [shape for module, shape in bank.base.observed.heads.items() if module in inside]
    if not seen:
        raise UsageError("no attention was seen in this base, whose keys could be kept", "Write with padded rows.")
    # Some compute attention several times a layer, with the same keys and values, or others.
    numbers = sum(s.heads * (s.head_dim + s.value_dim) * max(1, len(s.value_heads or ())) for s in seen)
    return numbers * model.dtype.itemsize
