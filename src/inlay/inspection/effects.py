"""What changed copies of an adapter score on the same rows, in the same forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inlay.bank.adapter import Part
from inlay.bank.bank import Bank
from inlay.bank.variants import variants
from inlay.evaluation.compare import compare
from inlay.evaluation.rows import RowScores
from inlay.evaluation.score import Items, score
from inlay.runtime.memory import TokenBudget

__all__ = ["Effect", "effects", "longest"]

Effect = dict[str, Any]
"""The `loss` of a changed copy, by how much it stands above that of the adapter itself (`difference`) with the 95 %
`interval` of that over rows, and whether the copy is `better` (None where rows do not tell them apart)."""
FEWEST = 4
"""Copies that share a forward at least, whatever the rows' length."""


def longest(items: Items) -> int:
    """Tokens of the longest row."""
    return max(len(getattr(item, "ids", ())) or len(getattr(item, "prompt", ())) + 8 for item in items.items)


def effects(
    bank: Bank, name: str, items: Items, made: Mapping[str, Sequence[Part]], budget: TokenBudget,
    scored: Mapping[str | None, RowScores], on_copies: Callable[[int], None] | None = None,
) -> dict[str, Effect]:  # fmt: skip
    """By the name of each copy in `made`, what it scores against the adapter `name`, which `scored` holds.

    As many copies as there is room for are rows of one forward. They are in the bank only as long as that takes.
    """
    own, names = scored[name], list(made)
    many = max(FEWEST, budget.tokens // longest(items))
    found: dict[str, Effect] = {}
    for start in range(0, len(names), many):
        chosen = names[start : start + many]
        with variants(bank, {copy: made[copy] for copy in chosen}):
            for copy, result in score(bank, items, chosen, budget).items():
                found[str(copy)] = effect(result.rows, own)
        if on_copies is not None:
            on_copies(len(chosen))
    return found


def effect(rows: RowScores, own: RowScores) -> Effect:
    """A copy's rows against the adapter's own."""
    told = compare(rows, own, "loss")
    interval = None if told.interval is None else list(told.interval)
    scores = rows.scores()
    kept = {key: scores[key] for key in ("accuracy",) if key in scores}
    return {"loss": scores["loss"], **kept, "difference": told.difference, "interval": interval, "better": told.better}
