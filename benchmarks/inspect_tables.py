"""The tables of inspect_figure.py, from what `inlay inspect --json` has said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["tables"]

Cell = Mapping[str, Any]
MOST = 5
"""Layers that a table shows."""


def tables(cells: Mapping[str, Cell], cases: Sequence[str]) -> str:
    """A part for each case that was measured, and what is missing."""
    parts = [_part(cell) for cell in cells.values()]
    if lacking := [case for case in cases if case not in cells]:
        parts.append(["Nothing has been measured yet." if not cells else f"Missing: {', '.join(lacking)}."])
    return "\n\n".join("\n".join(lines) for lines in parts)


def _part(cell: Cell) -> list[str]:
    found = cell["found"]
    title = f"**{' and '.join(found['methods'])}**, {found['parameters']:,} parameters"
    lines = [f"{title}, {_where(cell)}. {_score(found)}", ""]
    for table in (_ranks(found), _layers(found), *(_tokens(look) for look in found.get("virtual", ()))):
        lines += [*table, ""] if table else []
    lines.append("It says:")
    lines.append("")
    for one in found["findings"]:
        tried = f" Try: `{one['try']}`" if one["try"].startswith("--") else f" Try: {one['try']}" if one["try"] else ""
        lines.append(f"- {one['about']}{' (noise)' if one['noise'] else ''}: {one['words']}{tried}")
    if "writes_alone" in found:
        lines.append(f"- behind the virtual tokens alone the base writes {_code(found['writes_alone'])}")
    return lines


def _where(cell: Cell) -> str:
    rows = cell["found"].get("rows", 0)
    of = (
        f"trained on {cell['rows']:,} reviews (epochs: {cell['epochs']:g})"
        if cell["adapter"] is None
        else "an adapter given"
    )
    return f"{of}, {cell['dtype']}, looked at on {rows:,} others"


def _score(found: Cell) -> str:
    scores = found["scores"]
    told = f"Loss {scores['adapter']['loss']:.3f}"
    if "base" in scores:
        told += f", the base's {scores['base']['loss']:.3f} (difference {_apart(found['against_base'])})"
    both = [scores[name]["accuracy"] for name in ("adapter", "base") if "accuracy" in scores.get(name, {})]
    return told + (f"; accuracy {' against '.join(f'{one:.3f}' for one in both)}." if both else ".")


def _ranks(found: Cell) -> list[str]:
    short = found.get("modules_summary") or {}
    if not short:
        return []
    size = "" if short["relative_norm"] is None else f", of {short['relative_norm']:.2%} of the weight's norm"
    lines = ["| rank | loss more than uncut (95 %, paired) |", "|---|---|"]
    lines += [f"| cut to {own['rank']} | {_apart(own)} |" for own in found.get("ranks", ())]
    told = f"Of rank {short['rank']}, {short['effective_rank']:.1f} directions at work (effective rank, median of "
    return [f"{told}{short['sites']} modules{size}).", "", *(lines if len(lines) > 2 else [])]


def _layers(found: Cell) -> list[str]:
    layers = sorted(found.get("layers", ()), key=lambda own: -own["difference"])
    if not layers:
        return []
    sure = sum(own["better"] is False for own in layers)
    lines = ["| left out alone | loss more (95 %, paired) |", "|---|---|"]
    lines += [f"| layer {own['layer']} | {_apart(own)} |" for own in layers[:MOST]]
    by_chance = 0.025 * len(layers)
    return [
        *lines,
        "",
        f"{sure} of {len(layers)} layers cost loss beyond chance, where {by_chance:.1f} would by chance.",
    ]


def _tokens(look: Cell) -> list[str]:
    tokens = look["tokens"]
    lines = [
        "| virtual token | nearest words | cosine | of random vectors | began as it | moved | attention | without it, "
        "loss more (95 %, paired) |",
        "|---" * 8 + "|",
    ]
    for own in tokens:
        near = own.get("nearest") or []
        words = " ".join(_code(one["word"]) for one in near[:3]) or "–"
        began = "–" if not near or "began" not in own else "yes" if own["began"] == near[0]["id"] else "no"
        cosines = (f"{near[0]['cosine']:.2f}", f"{own['random_cosine']:.2f}") if near else ("–", "–")
        moved = "–" if own["moved"] is None else f"{own['moved']:.0%}"
        seen = "–" if "attention" not in own else f"{own['attention']['share']:.1%}"
        without = _apart(own["removed"]) if "removed" in own else "–"
        lines.append("| " + " | ".join([str(own["index"]), words, *cosines, began, moved, seen, without]) + " |")
    near = [own for own in tokens if own.get("chance", 1.0) <= 0.01]
    lines += ["", f"{len(near)} of {len(tokens)} are nearer to a word than one random vector in a hundred."]
    return lines


def _apart(told: Cell) -> str:
    ends = told["interval"]
    return f"{told['difference']:+.3f}" + ("" if ends is None else f" ({ends[0]:+.3f} to {ends[1]:+.3f})")


def _code(text: str) -> str:
    """As code in a table: what would end either is written as Python does."""
    shown = repr(text).replace("`", "\\x60").replace("|", "\\x7c")
    return f"`{shown}`"
