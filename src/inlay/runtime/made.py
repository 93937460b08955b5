"""What was cast and derived of adapters' parameters, for rows in any company; it goes when the adapter does."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from inlay.bank.adapter import Part
from inlay.bank.bank import Bank

__all__ = ["Made"]


class Made(dict[Any, Any]):
    """Of the values of a forward (`inlay.batch.forward.Forward.cache`) those that depend on one part alone."""

    def keep(self, values: Mapping[Any, Any], known: int) -> None:
        """Take what other forwards need not compute again; the first `known` of the values came from here."""
        new = islice(values.items(), known, None)
        self.update((key, value) for key, value in new if isinstance(key, tuple) and _of_part(key))

    def forget(self, bank: Bank) -> None:
        """Let go of what is of no adapter that the bank has."""
        parts = [part for adapter in bank.adapters.values() for part in adapter.parts]
        known = {id(part) for part in parts} | {id(value) for part in parts for value in part.constants.values()}
        for key in [key for key in self if id(key[1] if key[0] == "constant" else key[0]) not in known]:
            del self[key]


def _of_part(key: tuple[Any, ...]) -> bool:
    return isinstance(key[0], Part) or key[0] == "constant"
