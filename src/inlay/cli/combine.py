"""inlay combine"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console

from inlay.bank.rules import Clamp, Combination, Density, How, Rank, Signed, Thinning
from inlay.runs.settings import Base, as_path, as_paths
from inlay.values import Checked, From, Help, fields_of

from . import flags
from .common import console, emit


def as_numbers(value: Any) -> Any:
    """One number, or texts of numbers, as a list of numbers."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    try:
        return [float(number) for number in listed]
    except (TypeError, ValueError):
        raise ValueError("Give a number for each --adapter, in their order.") from None


@dataclass(frozen=True, kw_only=True)
class Combine(Checked):
    """What is combined, and by which rule."""

    adapter: Annotated[Sequence[str], From(as_paths), Help("an adapter's folder or its run's; give several")]
    weight: Annotated[
        Sequence[float], From(as_numbers), Help("an adapter's weight, in the same order; equal shares where unset")
    ] = ()
    how: How = "cat"
    out: Annotated[str, From(as_path), Help("a new folder for the adapter")]
    base: Base = "smollm2"
    rank: Rank = None
    density: Density = None
    signs: Signed = "total"
    clamp: Clamp = None
    seed: Thinning = 0


@flags.command(Combine, "combining")
def command(given: Combine, as_json: bool) -> None:
    """Make one LoRA of several adapters that are low-rank products, and say how far it is from their weighted sum.

    inlay combine --adapter runs/a --adapter runs/b --how cat --out both
    """
    by = Combination(**{field.name: getattr(given, field.name) for field in fields_of(Combination)})
    with console.status("combining"):
        from inlay.merging.combine import combine_to_folder

        result = combine_to_folder(given.base, given.adapter, given.weight, given.out, by)
    if as_json:
        return emit(result, True)
    out = Console(highlight=False)
    line = f"combined      {result['combined']}  ({result['how']}, rank {result['rank']})"
    out.print(line, markup=False, soft_wrap=True)
    for name, weight in zip(result["adapters"], result["weights"], strict=True):
        out.print(f"{weight:<12.4g}  {name}", markup=False, soft_wrap=True)
    mean, most = result["mean_difference"], result["max_difference"]
    out.print(
        f"apart         from the weighted sum by {mean:.2%} of it in the mean, {most:.2%} at most over the modules"
    )
    if not result["template"]:
        out.print("template      none: the adapters note none in common, so give --template where rows are read")
