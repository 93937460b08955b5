"""What scores, sizes, ranks, layers and units say in words, and what to try: rules over numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .finding import NONE, Change, Finding, Settings, cost_of, counted, listed, within

__all__ = [
    "about_calibration", "about_directions", "about_layers", "about_norms", "about_ranks", "about_scales",
    "about_score", "about_units",
]  # fmt: skip

SMALL, LARGE = 1e-3, 0.5
"""Norms of updates by their weights', beyond which one is unusual: LoRA's trained at usual rates lie between."""
BINS = 10
FEW = 10
"""Rows below which there is no verdict, as in `inlay.evaluation.compare`."""
MORE = "Look at more rows (--limit)."


# ---- the whole


def about_score(change: Change, rows: int) -> Finding:
    """The adapter against the base: `change` is its loss less the base's."""
    if not math.isfinite(change["difference"]):
        return Finding("score", "Its loss on these rows, or the base's, is no number.", "Train at a third of the rate.")
    told = f"on {counted(rows, 'row')} its loss differs from the base's by {within(change)}"
    if rows < FEW:
        return Finding("score", f"{told[0].upper()}{told[1:]}: too few to judge by.", MORE, noise=True)
    if change["better"]:
        return Finding("score", f"It is better than the base: {told}.")
    if change["better"] is None:
        then = f"{MORE} Where that stays so, train longer, or at three times the rate."
        return Finding("score", f"The rows do not tell it from the base: {told}.", then, noise=True)
    return Finding("score", f"It is worse than the base: {told}.", "Train at a third of the rate, or fewer epochs.")


def about_calibration(
    base: float | None, own: float, count: int, settings: Settings = NONE, of: str = "labels"
) -> Finding:
    """Expected calibration errors over `count` rows or tokens. Of n of them in `BINS` bins, one that is perfectly
    calibrated has up to about sqrt(2 / pi) * sqrt(BINS / n) / 2 by chance."""
    chance = math.sqrt(2 / math.pi) * 0.5 * math.sqrt(BINS / max(count, 1))
    against = "" if base is None else f" (the base: {base:.3f})"
    words = f"Its probabilities of {of} are off by {own:.3f} on the mean{against}"
    if own <= chance:
        return Finding("calibration", f"{words}; chance alone gives up to {chance:.3f} on so many.", noise=True)
    dropout = ", --set dropout=0.1" if "dropout" in settings else ""
    then = f"Fewer epochs{dropout} or --label-smoothing 0.1." if own > (base or 0) else ""
    return Finding("calibration", f"{words}; chance alone gives up to {chance:.3f}.", then)


# ---- changes of weights


def about_norms(summary: Mapping[str, Any]) -> Finding | None:
    """How large an update is beside its weights, on the median over modules."""
    size = summary.get("relative_norm")
    if size is None:
        return None
    words = f"What it adds has {size:.2%} of the norm of the weights it is added to, on the median"
    if size < SMALL:
        return Finding("size", f"{words}: it has hardly moved.", "A higher learning rate, or more steps.")
    if size > LARGE:
        return Finding("size", f"{words}: it outweighs the base.", "A lower learning rate, or fewer steps.")
    return Finding("size", f"{words}.")


def about_directions(summary: Mapping[str, Any]) -> Finding | None:
    """Whether updates lie along what the weights do most already: more than twice chance, or less than a half."""
    along, chance = summary.get("along_base"), summary.get("along_base_by_chance")
    if along is None or not chance:
        return None
    words = f"{along:.1%} of it lies along the weights' own strongest directions, by chance {chance:.1%}"
    if along > 2 * chance:
        return Finding("direction", f"{words}: it strengthens what the base does already.")
    if along < chance / 2:
        return Finding("direction", f"{words}: it is new to the base.")
    return Finding("direction", f"{words}: no more than a random change.", noise=True)


def about_scales(modules: Sequence[Any]) -> Finding | None:
    """By how much outputs or inputs are scaled: `modules` are `inlay.inspection.spectra.Spectrum`s."""
    found = sorted(own.scaled for own in modules if own.scaled is not None)
    if not found:
        return None
    size = found[len(found) // 2]
    words = f"It scales {counted(len(found), 'module')} by {size:.2%} up or down, on the median"
    if size < SMALL:
        return Finding("scales", f"{words}: they have hardly moved.", "A higher learning rate, or more steps.")
    return Finding("scales", f"{words}.")


def about_ranks(
    summary: Mapping[str, Any], ranks: Mapping[int, Change], gain: float, settings: Settings = NONE
) -> list[Finding]:
    """Whether a rank is too large, or too small: by what it costs to cut it. Another one is to be tried where it is the
    method's own setting."""
    if not summary:
        return []
    rank, effective, own = summary["rank"], summary["effective_rank"], settings.get("r") == summary["rank"]
    words = f"Of rank {rank}, {effective:.1f} directions are at work (effective rank, median)"
    if not ranks:
        return [Finding("rank", f"{words}.")] if rank > 1 else []
    if not gain > 0:
        return [Finding("rank", f"{words}. There is no sure gain that a lower rank could keep or lose.", noise=True)]
    costs = {k: cost_of(change, gain) for k, change in ranks.items()}
    free = [k for k in sorted(ranks, reverse=True) if all(costs[j] == "free" for j in ranks if j >= k)]
    highest = max(ranks)
    if free:
        least = min(free)
        told = f"{words}. Cut to rank {least}, it keeps nine tenths of its gain ({within(ranks[least])})"
        return [Finding("rank", f"{told}: {rank} is more than these rows need.", f"--set r={least}" if own else "")]
    if costs[highest] == "costs":
        told = f"{words}. Cut to rank {highest}, it loses {within(ranks[highest])}: its rank is needed."
        return [Finding("rank", told, f"--set r={2 * rank}" if own and effective > 0.75 * rank else "")]
    told = f"{words}. Whether rank {highest} would do, the rows do not tell ({within(ranks[highest])})."
    return [Finding("rank", told, MORE, noise=True)]


def about_layers(layers: Mapping[str, Change], gain: float, settings: Settings = NONE) -> list[Finding]:
    """Which blocks matter, each left out alone."""
    if not layers:
        return []
    if not gain > 0:
        return [Finding("layers", "There is no sure gain whose layers could be told.", noise=True)]
    costs = {block: cost_of(change, gain) for block, change in layers.items()}
    costly = sorted((b for b in layers if costs[b] == "costs"), key=lambda b: -layers[b]["difference"])
    free = [block for block in layers if costs[block] == "free"]
    if not costly:
        most = max(layers, key=lambda block: layers[block]["difference"])
        told = f"Left out alone, none of {counted(len(layers), 'layer')} costs more than a tenth of the gain for sure"
        told += f"; most does {most} ({within(layers[most])})"
        noise = len(free) < len(layers)
        fewer = "Fewer layers: --set layers='last 4', for one." if "layers" in settings else ""
        then = MORE if noise else fewer
        return [Finding("layers", f"{told}.", then, noise)]
    told = f"Of {counted(len(layers), 'layer')}, each left out alone, {len(costly)} cost loss: {listed(costly)}"
    first = costly[0]
    told += f"; most {first} ({within(layers[first])}). By chance about {0.025 * len(layers):.1f} would."
    numbers = [block for block in layers if costs[block] != "free"]
    then = ""
    if "layers" in settings and len(free) * 2 >= len(layers) and all(block.isdigit() for block in numbers):
        then = f"--set layers='{','.join(numbers)}': the other {len(free)} add little, each for itself."
    found = [Finding("layers", told, then)]
    if harmful := [block for block in layers if layers[block]["better"]]:
        words = f"Without what it does in {listed(harmful)} it would be better"
        found.append(Finding("layers", f"{words}; by chance about {0.025 * len(layers):.1f} would be.", ""))
    return found


# ---- bottlenecks


def about_units(sites: Sequence[Mapping[str, Any]], settings: Settings = NONE) -> Finding | None:
    """How many units of bottlenecks are dead."""
    units, dead = sum(site["units"] for site in sites), sum(site["dead"] for site in sites)
    if not units:
        return None
    words = f"{dead:,} of {units:,} units are dead: what they give does not vary over the rows"
    if dead * 2 > units:
        fewer = "Fewer units (a larger --set reduction_factor), or a" if "reduction_factor" in settings else "A"
        return Finding("units", f"{words}.", f"{fewer} lower rate.")
    return Finding("units", f"{words}." if dead else f"All {units:,} units are at work.")
