"""How long a row may be, by what the base has positions for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from inlay.errors import UsageError
from inlay.methods.contract import Method
from inlay.sites.positions import positions_of

__all__ = ["Fit", "fit_of"]

LEAST = 16
"""Positions that virtual tokens must leave for a row."""


@dataclass(frozen=True)
class Fit:
    """`max_length` tokens a row may have: what was `asked` for, or the `limit` that the base and the method leave."""

    max_length: int
    asked: int
    limit: int | None

    def notice(self, counts: Mapping[str, int], base: str) -> str:
        """What to say where the limit shortened rows; "" where it did not."""
        short = counts.get("cut", 0) + sum(n for reason, n in counts.items() if "too long" in reason)
        if self.max_length == self.asked or not short:
            return ""
        return (
            f"{base} has room for {self.limit} tokens in a row, not for --max-length {self.asked}: {short} rows are cut"
        )


def fit_of(model: nn.Module, method: Method, max_length: int) -> Fit:
    """Raises: UsageError where virtual tokens leave hardly a position."""
    positions, taken = positions_of(model), method.virtual_length + method.prefix_length
    if positions is None:
        return Fit(max_length, max_length, None)
    limit = positions - taken
    if taken and limit < LEAST:
        what = f"{taken} virtual tokens leave {max(limit, 0)} of the base's {positions} positions for a row"
        raise UsageError(
            what, f"Use {max(positions - LEAST, 1)} or fewer." if positions > LEAST else "Use another base."
        )
    return Fit(min(max_length, limit), max_length, limit)
